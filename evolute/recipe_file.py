"""A recipe read as plain YAML, with the command line's overrides, for what must be known before torch is imported."""

from collections.abc import Sequence
from typing import Any

import yaml

from evolute.registry import check_yaml, resolve


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``--any.key value`` and ``--any.key=value`` by key.

    Raises:
        ValueError: if a word is no option, or an option has no value.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no option; --any.key value goes to fit")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:  # a string for all we know; fit will judge
            found[key] = text
    return found


class Recipe:
    """The values of a recipe as they will be, as far as one can tell without its classes.

    Args:
        configs: names or files, later ones over earlier ones.
        given: overrides by dotted key.

    Raises:
        ValueError: if there is no such recipe, or it is not YAML.
    """

    def __init__(self, configs: Sequence[str], given: dict[str, Any]) -> None:
        self.given = given
        self._layers: list[dict[str, Any]] = []
        for name in configs:
            path = resolve(name)
            check_yaml(path)
            self._layers.append(yaml.safe_load(path.read_text(encoding="utf-8")))

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key; the command line may leave its ``init_args`` out."""
        for spelt in (key, key.replace(".init_args.", ".")):
            if spelt in self.given:
                return self.given[spelt]
        for layer in reversed(self._layers):
            place: Any = layer
            for part in key.split("."):
                place = place.get(part) if isinstance(place, dict) else None
            if place is not None:
                return place
        return default

    @property
    def workers(self) -> int:
        """Loader processes of each rank."""
        return int(self.value("data.init_args.num_workers", 0))

    def share(self, ranks: int, total: int | None = None) -> tuple[list[str], str]:
        """Share the samples of one optimizer step out among ranks.

        The step is the recipe's own, so that its learning rate fits and the curves compare: batch size, times
        accumulation, times the devices that the recipe names. Each rank accumulates as little as it can without
        a larger batch than the recipe's.

        Args:
            ranks: number of ranks.
            total: samples a step, another than the recipe's.

        Returns:
            Arguments of ``fit``, and a line that tells the user; neither if the recipe names no batch size and there
            is nothing to share.

        Raises:
            ValueError: if the samples do not divide, or the recipe names no batch size.
        """
        key = "data.init_args.batch_size"
        batch = self.value(key)
        if not isinstance(batch, int) or batch < 1:
            if ranks == 1 and total is None:
                return [], ""
            raise ValueError(f"the recipe says no {key} to share among {ranks} ranks: add --{key} N")
        own = batch * int(self.value("trainer.accumulate_grad_batches", 1)) * self._ranks()
        whole = own if total is None else total
        if whole % ranks:
            near = f"{whole - whole % ranks} or " if whole > ranks else ""
            raise ValueError(
                f"a step of {whole} samples does not divide among {ranks} ranks: "
                f"--global-batch {near}{whole - whole % ranks + ranks} would"
            )
        share = whole // ranks
        micro = max(size for size in range(1, min(batch, share) + 1) if share % size == 0)
        steps = share // micro
        line = f"{whole} samples a step{' as in the recipe' if whole == own else ''} = {ranks} ranks x {micro}"
        flags = [f"--{key}", str(micro), "--trainer.accumulate_grad_batches", str(steps)]
        return flags, line + (f" x {steps} accumulated" if steps > 1 else "")

    def _ranks(self) -> int:
        devices = self.value("trainer.devices", 1)
        count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
        return max(1, count) * int(self.value("trainer.num_nodes", 1))
