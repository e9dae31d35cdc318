"""The method's mathematics: tensors in, tensors out. No module, config, file, clock or process group; torch only.

Shapes, the same everywhere: a weight ``W`` is ``(out, in)`` and maps a column ``x`` to ``W x``; batches of vectors are
``(num_vectors, dim)``; bases have their vectors in columns, ``(dim, rank)``. Statistics come in float32 or better,
factorizations run in float64 (`linalg.to_decomposition_dtype`), and the caller casts their results once.

In the order of the method: sums over vectors (`moments`), what an error is weighed with (`metrics`), subspaces and
their union (`linalg`, `subspaces`), the best approximation in them (`approximation`), the ranks of all layers under
one budget (`allocation`), the factors of one layer (`factorization`, `interpolation`), and the product that trains
(`core_product`).
"""
