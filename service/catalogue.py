"""The models that a replica serves, by name."""

from collections.abc import Sequence

from service.classifier import Classifier
from service.errors import UnknownModel


class Catalogue:
    """The cores of all models.

    Attributes:
        classifiers: in the order of the settings.
        default: the one that answers a request without a name.
    """

    def __init__(self, classifiers: Sequence[Classifier], default: str | None = None) -> None:
        self.classifiers = tuple(classifiers)
        self._by_name = {classifier.card.name: classifier for classifier in classifiers}
        self.default = self._by_name[default] if default else self.classifiers[0]

    def find(self, name: str | None) -> Classifier:
        """The model of that name, or the default.

        Raises:
            UnknownModel: none is served under that name.
        """
        if name is None:
            return self.default
        if name not in self._by_name:
            served = ", ".join(map(repr, self._by_name))
            raise UnknownModel(f"no model {name!r} is served here; there is {served}")
        return self._by_name[name]
