"""A cluster of simulated engines under the real policy code, without Ray and without a GPU.

``state`` holds the columns, ``engine`` the compiled step loop, ``cluster`` the driver that lets the policy
decide, ``summary`` what is reported. Every number made here is simulated and says so.
"""
