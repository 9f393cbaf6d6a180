"""The best classes of an output, as the classification extension of the protocol writes them."""

from collections.abc import Sequence

import numpy as np

from service.models.card import Label
from service.transport.oip.tensors import Values, of_elements


def best(scores: Values, count: int, labels: Sequence[Label]) -> Values:
    """The best classes of each image, best first; of equal scores the lower class.

    Args:
        scores: `(images, classes)`.
        count: how many; at most all.
        labels: of the classes.

    Returns:
        `(images, count)`, BYTES, each `score:index:label`.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    written = [
        f"{row[index]:f}:{index}:{labels[index].name}".encode()
        for row, ranks in zip(scores, order, strict=True)
        for index in ranks.tolist()
    ]
    return of_elements(written, order.shape)
