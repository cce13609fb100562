"""Requests and answers through a broker that is not trusted: handshake, sealed packets, streams. No I/O in here.

``docs/adr/0005-tunnel-through-the-broker.md`` has the protocol and why it holds. ``End`` is one side of a session.
"""
