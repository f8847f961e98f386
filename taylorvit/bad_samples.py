"""The samples of a run that cannot be read, where data.on_error is skip: the same list on every process and in one file.

RUN_DIR/bad_samples.txt has one line for each: set, number, path and reason, with a tab between. Every process tells the others
after each update what it met for the first time, so that the list is complete before the next checkpoint, whoever dies when,
and all of them stop at the same update where there are too many.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from taylorvit.config import DataConfig
from taylorvit.data import ImageError, Loader, most_unreadable
from taylorvit.run_folder import replace_file

Key = tuple[str, int]  # set and number


class BadSamples:
    """What could not be read so far, by any process.

    Args:
        path: of the list.
        loaders: of the sets by name; every process has its own share of each.
        data: says whether and how many samples may be left out.
        accelerator: joins the processes.
    """

    def __init__(self, path: Path, loaders: dict[str, Loader], data: DataConfig, accelerator: Accelerator) -> None:
        self.path, self.loaders, self.data, self.accelerator = path, loaders, data, accelerator
        self.active = data.on_error == "skip"
        self.known: dict[Key, str] = {}  # the line of each

    def start(self, *, continued: bool) -> None:
        """Read the list of the run that is continued; one that starts anew begins it.

        Raises:
            ValueError: the list is not one of ours.
        """
        if not self.active:
            return
        found: dict[Key, str] = {}
        if self.accelerator.is_main_process:
            if continued and self.path.exists():
                found = _parse(self.path)
            else:
                self.path.unlink(missing_ok=True)
        self.known = broadcast_object_list([found])[0]

    def share(self) -> None:
        """Tell all processes what each has met since the last call; all must call it at the same point.

        Raises:
            ImageError: on every process, if there are more of a set than data.max_bad_share allows.
        """
        if not self.active:
            return
        new = {
            (name, number): _line(name, number, loader, message)
            for name, loader in self.loaders.items()
            for number, message in loader.unreadable.items()
            if (name, number) not in self.known
        }
        count = torch.tensor(float(len(new)), device=self.accelerator.device)
        if not self.accelerator.reduce(count, reduction="sum").item():
            return
        for found in gather_object([new]):
            self.known |= found
        if self.accelerator.is_main_process:
            replace_file(self.path, "".join(self.known[key] + "\n" for key in sorted(self.known)))
        self._check()

    def describe(self) -> list[str]:
        """Return one line for each set that misses something."""
        treated = {"train": "replaced by others", "val": "left out"}
        return [
            f"{count} of {len(loader.dataset)} {name} samples cannot be read and are {treated[name]}; {self.path} lists them"  # type: ignore[arg-type]
            for name, loader in self.loaders.items()
            if (count := self._count(name))
        ]

    def _count(self, name: str) -> int:
        return sum(key[0] == name for key in self.known)

    def _check(self) -> None:
        for name, loader in self.loaders.items():
            total = len(loader.dataset)  # type: ignore[arg-type]
            most, count = most_unreadable(total, self.data), self._count(name)
            if count > most:
                raise ImageError(
                    f"{count} of {total} {name} samples cannot be read; data.max_bad_share {self.data.max_bad_share:g} allows "
                    f"{most}; {self.path} lists them: repair them and delete the list, or allow more"
                )


def _line(name: str, number: int, loader: Loader, message: str) -> str:
    path = loader.dataset.dataset.sample_name(number)  # type: ignore[attr-defined]
    reason = message.removeprefix(f"cannot read image {path}: ")
    return "\t".join([name, str(number), _printable(path), _printable(reason)])


def _printable(text: str) -> str:
    """Write what would break the line or its encoding, such as a tab in a file's name, as Python would."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _parse(path: Path) -> dict[Key, str]:
    known: dict[Key, str] = {}
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name, number, *rest = [*line.split("\t"), "", ""][:4]
        if not number.isdecimal() or not any(rest):
            raise ValueError(
                f"{path}, line {place}: expected set, number, path and reason with tabs between, got {line[:100]!r}"
            )
        known[name, int(number)] = line
    return known
