"""From values per position of many axes to values per unit, as one sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix

from prunus.graph.axis import Label


def incidence(labels: Sequence[Label], units: int) -> csr_matrix:
    """Which unit stands on which position, shape ``(units + 1, Σ n)``.

    A unit that fills several columns of one position is there once; row 0, of the unit that
    stays, is empty.

    >>> label = np.array([[1, 1], [2, 1], [0, 2]])
    >>> incidence([label], 2).toarray()
    array([[0., 0., 0.],
           [1., 1., 0.],
           [0., 1., 1.]])
    """
    rows, columns, start = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for label in labels:
        own = np.sort(label, axis=1)
        own[:, 1:][own[:, 1:] == own[:, :-1]] = 0
        position, column = np.nonzero(own)
        rows.append(own[position, column])
        columns.append(position + start)
        start += len(label)
    at = (np.concatenate(rows), np.concatenate(columns))
    entries = np.ones(len(at[0]))
    return coo_matrix((entries, at), shape=(units + 1, start)).tocsr()
