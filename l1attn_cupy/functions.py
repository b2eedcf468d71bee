"""The score functions F: their names, and the codes by which kernels know them (``common.cuh`` has the same)."""

INVERSE, NEGATIVE, LAPLACIAN, DISTANCE = range(4)

#: Name of each score and its code. With ``x = scale * sum_k |q_k - k_k|``: ``1 / (eps + x)``, ``-x``, ``exp(-x)``, ``x``.
SCORES = {"inverse": INVERSE, "negative": NEGATIVE, "laplacian": LAPLACIAN, "distance": DISTANCE}

#: Scores whose derivative depends on the score: the backward pass needs the forward result, or the distance again.
CURVED = frozenset({"inverse", "laplacian"})
