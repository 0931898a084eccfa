"""A bundle: a model with exits, its calibrated policies and how it is fed, in one directory that holds no code."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from offramp.artefacts import read_json
from offramp.bundle.choice import PLAIN, Choice, about_choice, plain_policy, read_choice, write_choice
from offramp.bundle.files import compare, example_tensors, read_example, read_preprocess, read_tensors
from offramp.bundle.model import BundledModel, decode_model, encode_model
from offramp.bundle.store import Manifest, Write, read_manifest, write_store
from offramp.cost import Budget, CostModel
from offramp.engines import Engine
from offramp.engines import engine as engine_of
from offramp.errors import DataError, FormatError, ValueRangeError
from offramp.graph import three_rows
from offramp.inputs import Inputs
from offramp.machine import machine_line, versions
from offramp.model import ExitModel
from offramp.policies import Policy
from offramp.policies.base import check_exits, check_signals
from offramp.preprocess import Preprocess
from offramp.record import to_device
from offramp.runtime import Runtime

__all__ = ["Answer", "Bundle"]

POLICY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Answer:
    """What a bundle says of one row: number from 0, label, probability, the exit it left at, the score there."""

    row: int
    label: str
    probability: float
    exit: int
    score: float


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model with exits and everything that is needed to use it elsewhere, without the code that made it.

        Bundle(model, labels=("no", "yes"), policies={"half": Choice(found.policy, found)}).save("film.offramp")
        bundle = Bundle.load("film.offramp")
        bundle.runtime("half")(inputs)                   # or bundle.runtime(budget=Budget(fraction=0.5))
        bundle.predict([{"text": "a film that stays with you"}])

    Args:
        model: from `attach`, or of another bundle.
        labels: a name for each class.
        policies: by name; a bundle always has "plain" too.
        default: the policy that runs when none is named; the first one unless given, "plain" when there is none.
        costs: from `measure`.
        preprocess: from a raw row to inputs; without it the bundle takes tensors only.
        title: a line for readers.
        about: JSON values for the record, such as which rows were used for what.

    Raises:
        ValueRangeError: labels, names or policies do not fit the model.
        ShapeError: a policy is for another number of exits, or needs signals that the model does not have.
    """

    model: ExitModel
    labels: tuple[str, ...]
    policies: Mapping[str, Choice] = field(default_factory=dict)
    default: str | None = None
    costs: CostModel | None = None
    preprocess: Preprocess | None = None
    title: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "labels", tuple(self.labels))
        put(self, "policies", dict(self.policies))
        put(self, "default", self.default or next(iter(self.policies), PLAIN))
        if len(self.labels) != self.model.classes or len(set(self.labels)) != len(self.labels):
            raise ValueRangeError(f"there are {len(set(self.labels))} different labels; expected {self.model.classes}.")
        for name, choice in self.policies.items():
            if not POLICY_NAME.fullmatch(name) or name == PLAIN:
                raise ValueRangeError(
                    f"a policy is called {name!r}; expected letters, digits, dots and dashes, and not {PLAIN!r}."
                )
            check_exits(choice.policy, self.model.exits)
            check_signals(choice.policy, self.model.signals)
        if self.default not in (*self.policies, PLAIN):
            raise ValueRangeError(f"the default is {self.default!r}; expected one of {', '.join(self.names)}.")
        if self.costs is not None and self.costs.exits != self.model.exits:
            raise ValueRangeError(f"the costs are for {self.costs.exits} exits; the model has {self.model.exits}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the policies, "plain" last."""
        return (*self.policies, PLAIN)

    def choose(self, name: str | None = None, *, budget: Budget | None = None) -> tuple[str, Policy]:
        """(name, policy): the one called so, the one that spends most of a budget without passing it, or the default.

        Raises:
            ValueRangeError: there is no such policy, none is known to keep the budget, or both are given.
        """
        if name is not None and budget is not None:
            raise ValueRangeError("a policy and a budget are given; expected one of them.")
        if budget is not None:
            return self._within(budget)
        name = name or self.default or PLAIN
        if name == PLAIN:
            return PLAIN, plain_policy(self.model.exits)
        if name not in self.policies:
            raise ValueRangeError(f"the bundle has no policy {name!r}; expected one of {', '.join(self.names)}.")
        return name, self.policies[name].policy

    def _within(self, budget: Budget) -> tuple[str, Policy]:
        spent = {name: choice.spent(budget, self.costs) for name, choice in self.policies.items()}
        known = {name: cost for name, cost in spent.items() if cost is not None}
        kept = {name: cost for name, cost in known.items() if cost <= budget.amount * (1 + 1e-9)}
        if not kept:
            told = ", ".join(f"{name} {cost:.4g}" for name, cost in sorted(known.items(), key=lambda item: item[1]))
            raise ValueRangeError(
                f"no policy of the bundle is known to keep {budget}; they spend: {told or 'nothing that is known'}. "
                "Give a larger budget, name a policy, or calibrate one for it and add it."
            )
        name = max(kept, key=lambda each: (kept[each], self.policies[each].tested.get("accuracy") or 0.0))
        return name, self.policies[name].policy

    def runtime(
        self,
        name: str | None = None,
        *,
        budget: Budget | None = None,
        engine: str | Engine = "eager",
        precision: str | None = None,
        threads: int | None = None,
    ) -> Runtime:
        """The runtime under the policy that `choose` gives, on the engine; the bundle's costs say where regrouping pays
        when they were measured with it.

        Args:
            name, budget: which policy.
            engine, precision, threads: as for `Runtime`.

        Raises:
            ValueRangeError: the bundle has no such policy, or the engine or precision is none.
            NotStageable, MissingExtra: the engine cannot run this model, or not here.
        """
        name, policy = self.choose(name, budget=budget)
        found = None if name not in self.policies else self.policies[name].calibration
        if not isinstance(engine, Engine):
            engine = engine_of(self.model, engine, precision=precision, threads=threads)
        costs = (
            self.costs if self.costs is not None and self.costs.measured_with(engine.name, engine.precision) else None
        )
        return Runtime(self.model, policy, engine, costs=costs, calibrated=None if found is None else found.precision)

    def predict(
        self,
        rows: Iterable[Mapping[str, Any]],
        name: str | None = None,
        *,
        budget: Budget | None = None,
        batch_size: int = 32,
        engine: str | Engine = "eager",
        precision: str | None = None,
        threads: int | None = None,
    ) -> Iterator[Answer]:
        """One answer per raw row, in order; rows are taken as they are wanted, `batch_size` at a time.

        Args:
            rows: each a mapping of the columns that the preprocessing reads.
            name, budget: which policy.
            engine, precision, threads: as for `runtime`, which is made once for all rows.

        Raises:
            DataError: the bundle takes tensors only, or a row cannot be used; the message has its number.
            ValueRangeError, NotStageable, MissingExtra: as for `runtime`.
        """
        run, number = self.runtime(name, budget=budget, engine=engine, precision=precision, threads=threads), 0
        preprocess = self.preprocess
        if preprocess is None:
            raise DataError("the bundle has no preprocessing, so it takes tensors: bundle.runtime()(inputs).")
        device, source = next(self.model.parameters()).device, iter(rows)
        while chunk := list(islice(source, batch_size)):
            for place, row in enumerate(chunk):
                if (why := preprocess.check(row)) is not None:
                    raise DataError(f"row {number + place}: {why}")
            said = run(to_device(preprocess.batch(chunk), device))
            columns = (said.label, said.probabilities.max(dim=-1).values, said.exit, said.score)
            for label, probability, exit_, score in zip(*(column.tolist() for column in columns), strict=True):
                yield Answer(number, self.labels[label], probability, exit_, score)
                number += 1

    def with_policies(self, policies: Mapping[str, Choice], default: str | None = None) -> "Bundle":
        """The same bundle with these policies instead; saved to the same folder, it does not write the model again."""
        return replace(self, policies=policies, default=default)

    def save(self, folder: str | Path) -> Path:
        """The folder, after the bundle was written to it; an interrupted save leaves an older bundle there whole.

        The programs are read back and compared with the model on the example before anything is written.

        Raises:
            NotStageable: the model cannot be cut, or holds what a bundle does not.
            FormatError: the folder holds something else.
        """
        value, held = encode_model(self.model)
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in held.items()}
        inputs, logits, signals = self._example()
        compare(decode_model(value, tensors, inputs, torch.device("cpu")), inputs, logits, signals)
        about = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine_line(),
            "title": self.title,
            "labels": list(self.labels),
            "exits": self.model.exits,
            "taps": list(self.model.taps),
            "default": self.default,
            "policies": {name: about_choice(choice) for name, choice in self.policies.items()},
            "about": dict(self.about),
        }
        with tempfile.TemporaryDirectory() as scratch:
            return write_store(
                folder, self._writers(value, tensors, example_tensors(inputs, logits, signals), Path(scratch)), about
            )

    def _example(self) -> tuple[Inputs, Tensor, Tensor | None]:
        inputs = self.model.example if isinstance(self.model, BundledModel) else three_rows(self.model.example)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                logits, signals = self.model.forward_with_signals(inputs)
        finally:
            self.model.train(training)
        return to_device(inputs, torch.device("cpu")), logits.cpu(), None if signals is None else signals.cpu()

    def _writers(
        self, value: Any, tensors: dict[str, Tensor], example: dict[str, Tensor], scratch: Path
    ) -> dict[str, tuple[str, Write]]:
        made: dict[str, tuple[str, Write]] = {
            "programs": ("programs.json", partial(_write_text, json.dumps(value))),
            "weights": ("weights.safetensors", lambda path: save_file(tensors, path)),
            "example": ("example.safetensors", lambda path: save_file(example, path)),
        }
        if self.costs is not None:
            made["costs"] = ("costs.json", self.costs.save)
        for name, choice in self.policies.items():
            made[f"policies/{name}"] = (
                f"policy-{name.replace('.', '_')}.json",
                partial(write_choice, choice),
            )
        if self.preprocess is not None:
            self.preprocess.save(scratch)
            for path in sorted(scratch.iterdir()):
                made[f"preprocess/{path.name}"] = (path.name, partial(shutil.copyfile, path))
        return made

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu", check: bool = True) -> "Bundle":
        """The bundle in a folder that `save` wrote. Nothing of it is run as code: see `offramp.bundle.program`.

        Args:
            device: where the model runs.
            check: run the example that the bundle holds and compare with the answers that it holds.

        Raises:
            FormatError: the folder is no bundle, or is damaged, truncated, foreign, newer than this Offramp, or answers
                otherwise here than where it was written.
            MissingExtra: its texts or images need a package that is not installed.
        """
        manifest = read_manifest(folder)
        if manifest.fields.get("generates"):
            raise FormatError(f"{folder} holds a model that generates: use `offramp generate` or `offramp caption`.")
        try:
            return cls._read(manifest, torch.device(device), check)
        except FormatError as error:
            if read_manifest(folder).files != manifest.files:  # it was replaced while it was read
                return cls._read(read_manifest(folder), torch.device(device), check)
            raise FormatError(_named(error, manifest.folder)) from None

    @classmethod
    def _read(cls, manifest: Manifest, device: torch.device, check: bool) -> "Bundle":
        inputs, logits, signals = read_example(read_tensors(manifest.path("example")))
        weights = read_tensors(manifest.path("weights"))
        model = decode_model(read_json(manifest.path("programs")), weights, inputs, device)
        if check:
            compare(model, inputs, logits, signals)
        fields = dict(manifest.fields)
        try:
            policies = {
                role.removeprefix("policies/"): read_choice(
                    manifest.path(role), fields["policies"][role.removeprefix("policies/")]
                )
                for role in manifest.files
                if role.startswith("policies/")
            }
            return cls(
                model=model,
                labels=tuple(map(str, fields["labels"])),
                policies={name: policies[name] for name in fields["policies"]},
                default=str(fields["default"]),
                costs=CostModel.load(manifest.path("costs")) if "costs" in manifest.files else None,
                preprocess=read_preprocess(manifest),
                title=str(fields["title"]),
                about=dict(fields["about"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"its manifest is damaged: {error}") from None


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _named(error: FormatError, folder: Path) -> str:
    """The message of an error, which names the bundle."""
    text = str(error)
    return text if str(folder) in text else f"{folder} is a damaged bundle: {text}"
