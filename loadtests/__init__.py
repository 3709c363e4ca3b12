"""Load tests of an OpenAI-compatible endpoint: traces, open-loop replay, metrics and the report.

The reading order: ``traces`` (what arrives when), ``readers`` and ``synthetic`` (where traces come from),
``client`` (one streamed request, timed), ``user`` and ``replay`` (the Locust run), ``records`` (the files a
run leaves), ``metrics``, ``comparison``, ``table``, ``charts`` and ``report`` (what they mean).

Importing this package loads neither Locust nor httpx: Locust patches the standard library for gevent, so
only the replay's own process may import it.
"""
