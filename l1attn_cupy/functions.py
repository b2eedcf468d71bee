"""The score functions F: their names, and the codes by which kernels know them (``common.cuh`` has the same)."""

INVERSE, NEGATIVE, LAPLACIAN, DISTANCE = range(4)

#: Name and code of each: ``1 / (eps + x)``, ``-x``, ``exp(-x)`` and ``x``, with ``x = scale * sum_k |q_k - k_k|``.
SCORES = {"inverse": INVERSE, "negative": NEGATIVE, "laplacian": LAPLACIAN, "distance": DISTANCE}

#: Scores whose derivative depends on the score: the backward pass needs the forward result, or the distance again.
CURVED = frozenset({"inverse", "laplacian"})
