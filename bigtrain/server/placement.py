"""Which servers hold a block. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def place(
    names: Sequence[str], sizes: Sequence[int], hosts: Sequence[str], replicas: int
) -> list[tuple[int, ...]]:
    """Return the servers of each block, the first of which answers for it while it lives.

    hosts: of the servers. A block's replicas are on different ones, as far as there are so many: a
    host's end is that of all its servers. Else all hold about as many elements, and answer for as
    many: the largest block first, each goes to the servers that have least, and hashes decide
    between equals. (Blocks are few and large, so that hashes alone would leave one server with most
    of them.) All who know the same blocks come to the same answer.
    """
    servers = len(hosts)
    found: list[tuple[int, ...]] = [()] * len(names)
    held, answers = [0] * servers, [0] * servers
    order = sorted(range(len(names)), key=lambda i: (-sizes[i], names[i]))
    for index in order:
        left = sorted(range(servers), key=lambda s: (held[s], _weight(names[index], s)))
        chosen: list[int] = []
        while left and len(chosen) < replicas:
            taken = {hosts[server] for server in chosen}
            chosen.append(next((s for s in left if hosts[s] not in taken), left[0]))
            left.remove(chosen[-1])
        chosen.sort(key=lambda s: (answers[s], held[s], _weight(names[index], s)))
        answers[chosen[0]] += sizes[index]
        for server in chosen:
            held[server] += sizes[index]
        found[index] = tuple(chosen)
    return found


def _weight(name: str, server: int) -> bytes:
    return hashlib.sha256(f"{name}|{server}".encode()).digest()
