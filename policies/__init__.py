"""Which precision each replica serves in, and how many replicas there are.

Pure functions of what the replicas report: no Ray, no vLLM and no clock of their own. Reading order:
``protocol`` (the messages), ``snapshot`` and ``config`` (what a decision sees), ``controllers`` (what they
want), ``policy`` (the one ``decide`` with its bounds), ``actor`` and ``replica`` (the ends of the protocol).
"""
