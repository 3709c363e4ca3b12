"""Prompts of about a wanted number of tokens, made of plain words; deterministic.

The words are common enough to be one token each, with the space before them, in the usual byte-pair
vocabularies, so that words count tokens. A chat template adds some tokens of its own. How many tokens the
server counted comes back in the response's ``usage``, and the results record that, not the wish.
"""

from __future__ import annotations

import numpy as np

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name team minute idea body
information back parent face level office door health person art war history party result change morning
reason research girl moment air teacher force education foot boy age policy music market sense nation plan
college interest death experience effect use class control field development role effort rate heart garden
show leader light voice wife police mind price report decision son view relationship town road arm
difference value building action season society tax director position player record paper space ground form
event matter center couple site project activity star table need court oil situation cost industry figure
street image phone data picture practice piece land product doctor wall worker news test movie north love
support technology step baby computer type attention film tree source hair look chance fire future
"""
WORDS = tuple(_TEXT.split())


def prompt_text(tokens: int, seed: int, index: int) -> str:
    """``tokens`` words, the same for equal arguments and different from the first words on for others.

    Prompts of one replay share no prefix, so a prefix cache gives no head start.
    """
    if tokens < 1:
        raise ValueError(f"a prompt of {tokens} tokens was asked for; lengths are at least 1")
    chosen = np.random.default_rng([seed, index]).integers(0, len(WORDS), tokens)
    return " ".join(WORDS[word] for word in chosen)
