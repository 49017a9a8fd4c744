"""The manifest of an adapter: its concept, training, base, gate defaults and measured results."""

import hashlib
import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from spm_hub.errors import ManifestError, NotFoundError, RegistryError, UsageError, nearest
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.wording import quoted

NonBlank = Annotated[str, StringConstraints(pattern=r"\S")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# What messages and tags quote whole is a word, or no longer than a name on a disk or on the Hub.
Label = Annotated[str, StringConstraints(pattern=r"^\w[\w .:/+-]{0,63}$")]
ModulePath = Annotated[str, StringConstraints(pattern=r"\S", max_length=untrusted.MAX_NAME_LENGTH)]
NAME = r"^[a-z0-9][a-z0-9._-]{0,95}$"
"""Pattern of an adapter's name, which is also that of its files."""


MAX_BYTES = 4 * 2**20
"""Far above any manifest (SDXL at all layers and a thousand measured numbers: 0.3 MB)."""

UNFOLDS = 10
"""Times the length of the text; ours take half of that."""

MANY_MISTAKES = 1000
"""Above this they are counted and not listed: the list would take more memory than the manifest."""


class _Part(BaseModel):
    """Strict and immutable: an unknown key is an error, and every number is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Concept(_Part):
    """The erased concept.

    target: None where nobody has said which it is; the eraser then acts on every prompt.  aliases: other names, to
    which the gate responds as well.  surrogate: what the concept turns into, "" for nothing.
    """

    target: NonBlank | None
    aliases: tuple[NonBlank, ...] = ()
    surrogate: str = ""
    kind: Literal["object", "character", "person", "style", "nsfw", "other"] = "other"

    @property
    def names(self) -> tuple[str, ...]:
        """The target and its aliases, to which the gate responds; none for an unknown concept."""
        return () if self.target is None else (self.target, *self.aliases)

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """Return the concept with these names, the target first; the unknown one for none."""
        return cls(target=names[0] if names else None, aliases=tuple(names[1:]))

    def require_target(self, source: str = "FILE") -> str:
        """Return the target. Raises UsageError where it is unknown.

        source: the eraser's file or name, for the message.
        """
        if self.target is None:
            raise UsageError(
                f"{'this eraser' if source == 'FILE' else source} names no concept, and this needs to know which it is",
                mend=f"spmhub convert {shlex.quote(source)} --concept NAME",
            )
        return self.target

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.target is None and self.aliases:
            raise ValueError(f"target is null, and aliases has {self.aliases[0]!r}: the first name is the target")
        return self


class IncrementInfo(_Part):
    """The content of the adapter file.

    `file`, `bytes` and `sha256` describe the file itself, so only the manifest outside the file has them.
    """

    kind: Literal["low_rank", "dense", "mask"]
    rank: int | None = Field(default=None, ge=1, description="rank of every low-rank increment in the file")
    dtype: Label
    modules: tuple[ModulePath, ...] = Field(
        min_length=1, description="paths of the changed modules inside the denoiser"
    )
    file: str | None = Field(default=None, pattern=r"^[^/\\]{1,255}$")
    bytes: int | None = Field(default=None, ge=0)
    sha256: Sha256 | None = Field(default=None, description="of the whole adapter file")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.rank is None) == (self.kind == "low_rank"):
            raise ValueError(f"rank is {self.rank} for kind {self.kind}: low_rank has a rank, the others have none")
        if len(set(self.modules)) != len(self.modules):
            twice, _ = Counter(self.modules).most_common(1)[0]
            raise ValueError(f"modules names {twice} twice")
        return self


class Base(_Part):
    """The model that the adapter was trained on.

    `id` and `fingerprint` are "" for a file whose program did not record them.
    """

    family: Label
    id: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,255}$")
    revision: str | None = None
    fingerprint: str = Field(
        pattern=r"^([0-9a-f]{64})?$",
        description='sha256 over sorted "path:out,in[,kh,kw]\\n" lines of the changed modules',
    )


GateName = Literal["calibrated", "transport", "always", "evidence"]
"""The gates that have a name: see `spm_hub.attachment.gates`."""


GammaLaw = Literal["linear", "squared"]
"""How the weights' change follows from gamma: as gamma times strength, or as the square of this."""


def factor_of(law: GammaLaw, gamma: float, strength: float) -> float:
    """Return the factor of an eraser's change of the weights."""
    product = gamma * strength
    return product * product if law == "squared" else product


class GateDefaults(_Part):
    """The adapter's gate, unless the user chooses another.

    `Manifest.default_gate` says what kind "transport" means in a manifest of version 1.
    """

    kind: GateName = "calibrated"
    strength: float = 1.0
    rows: Literal["both", "conditional"] = "both"
    law: GammaLaw = Field(
        default="linear",
        description="the factor of the change is gamma times strength, or squared, as in the code released with SPM, "
        "which multiplies both vectors of a layer by gamma",
    )
    protected: tuple[str, ...] = Field(
        default=(), description="prompts that the increments have no effect on: gamma is 0 there, whatever the gate"
    )

    @property
    def full(self) -> float:
        """The factor of the change at gamma 1."""
        return factor_of(self.law, 1.0, self.strength)


MOST_STRENGTH = 4.0
"""Greatest strength that a stranger's eraser may have; those of published ones are near 1."""


def excess_of(strength: float) -> str | None:
    """Say why a stranger's eraser must not have this strength; None if it is from 0 to 4."""
    if strength < 0:
        return f"its strength is {strength:g}: it adds what it claims to erase"
    if strength > MOST_STRENGTH:
        return f"its strength is {strength:g}; nothing above {MOST_STRENGTH:g} is usual"
    return None


class Origin(_Part):
    """The Hub repository and commit that this copy was pulled from.

    revision: the branch or tag that was asked for, None for the default branch.
    """

    repo: str = Field(pattern=r"^[\w][\w.-]{0,95}/[\w][\w.-]{0,95}$")
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    revision: Annotated[NonBlank, StringConstraints(max_length=255)] | None = None


class Training(_Part):
    """The end of a training, and the progress that was made by then.

    steps: those taken, of `planned`, the recipe's; both are 0 for a closed form.  reached: the share of the way from
    the concept to its surrogate that the base's predictions went, averaged over the last steps; goal: the share that
    the training aimed at. Both are None where the method does not measure them.
    """

    steps: int = Field(ge=0)
    planned: int = Field(ge=0)
    ended: Literal["all steps", "early stop", "callback", "closed form"]
    reached: float | None = None
    goal: float | None = None


class Evaluation(_Part):
    """One measured number; `reference` is the same number without the eraser.

    samples: pictures, or other cases, that it is the mean of. steps, guidance, gate, version and date say how, with
    which spm-hub and when it was measured; None where that was not recorded. interval: of 95 %. protocol_sha256: of the
    protocol as data. report_sha256: of the report, report.json, that the number comes from.
    """

    protocol: NonBlank
    base: NonBlank
    subject: NonBlank
    metric: NonBlank
    value: float
    reference: float | None = None
    samples: int = Field(ge=1)
    seed: int
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = None
    gate: Label | None = None
    version: Label | None = None
    date: datetime | None = None
    interval: tuple[float, float] | None = None
    protocol_sha256: Sha256 | None = None
    report_sha256: Sha256 | None = None

    @model_serializer(mode="wrap")
    def _without_what_was_not_recorded(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the keys that say how it was measured where they are None.

        Manifests from before these keys existed stay as they are, and their signatures valid.
        """
        unrecorded = {key for key in _LATER_IN_EVALUATIONS if getattr(self, key) is None}
        return {key: value for key, value in handler(self).items() if key not in unrecorded}


_LATER_IN_EVALUATIONS = (
    "steps", "guidance", "gate", "version", "date", "interval", "protocol_sha256", "report_sha256",
)  # fmt: skip
"""Keys that evaluations did not have at first."""


class Manifest(_Part):
    """The whole manifest of an adapter, version 2.

    Version 1 has the same keys; only its gate is read otherwise (`default_gate`). A manifest keeps its version, so that
    signatures and hashes of it stay valid.
    """

    schema_version: Literal[1, 2] = 2
    name: Annotated[str, StringConstraints(pattern=NAME)]
    concept: Concept
    increment: IncrementInfo
    base: Base
    recipe: dict[str, JsonValue] = Field(
        description="the whole recipe: training it again gives the identical file, unless a callback ended the training"
    )
    training: Training | None = Field(default=None, description="None for an eraser of another program or release")
    versions: dict[str, str] = {}
    gate: GateDefaults = GateDefaults()
    evaluation: tuple[Evaluation, ...] = ()
    licence: str = "apache-2.0"
    author: str = ""
    created: datetime | None = None
    signed: datetime | None = Field(
        default=None, description="when it was signed; where signatures are required, no older one replaces it"
    )
    origin: Origin | None = None

    @property
    def default_gate(self) -> GateName:
        """The gate of the eraser, unless the user chooses another.

        Programs that wrote version 1 put "transport" into every manifest, and nobody had chosen it: it counts as no
        choice. In version 2 it is one.
        """
        unchosen = self.schema_version == 1 and self.gate.kind == "transport"
        return "calibrated" if unchosen else self.gate.kind

    def richer_evaluation(self, protocol: str, base: str, samples: int, steps: int | None) -> Evaluation | None:
        """Return a number of that protocol and base that rests on more samples or steps than these, or None."""
        for one in self.evaluation:
            more_steps = one.steps is not None and steps is not None and one.steps > steps
            if (one.protocol, one.base) == (protocol, base) and (one.samples > samples or more_steps):
                return one
        return None

    def is_called(self, name: str) -> bool:
        """Return whether `name` is this eraser's name or target, in any spelling; an alias is neither."""
        return plain_name(name) in {plain_name(one) for one in (self.name, self.concept.target) if one is not None}

    def to_json(self) -> str:
        """Return the text of the manifest file: indented JSON that ends with a newline.

        Signatures cover it, so that keys which older manifests do not have are written only where they have a value.
        """
        return self.model_dump_json(indent=2, exclude=self._without_a_value()) + "\n"

    def _without_a_value(self) -> dict[str, Any]:
        """Return the keys that an older manifest would not have, and this one has no value for."""
        unset: dict[str, Any] = {key: True for key in ("training", "signed") if getattr(self, key) is None}
        measured = {
            row: {key for key in _LATER_IN_EVALUATIONS if getattr(one, key) is None}
            for row, one in enumerate(self.evaluation)
        }
        if self.gate.law == "linear":
            unset["gate"] = {"law"}
        return {**unset, "evaluation": measured}

    def to_embedded_json(self) -> str:
        """Return the copy for the header of the adapter file.

        It leaves out times, the facts about the file itself, and later results. The same seed therefore gives the
        identical file, whenever it is trained and however it is evaluated.
        """
        omitted: dict[str, Any] = dict.fromkeys(("created", "evaluation", "origin", "signed"), True)
        omitted["increment"] = {"file", "bytes", "sha256"}
        omitted |= {key: value for key, value in self._without_a_value().items() if key != "evaluation"}
        return json.dumps(self.model_dump(mode="json", exclude=omitted), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, source: object = "manifest") -> "Manifest":
        """Parse and check a manifest.

        source: named in errors. Raises ManifestError with the offending keys.
        """
        try:
            if len(text) > MAX_BYTES:
                raise ValueError(f"it has {len(text)} bytes, no manifest needs more than {MAX_BYTES}")
            untrusted.parse(text.encode() if isinstance(text, str) else text, unfolds=UNFOLDS)
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            if error.error_count() > MANY_MISTAKES:
                raise _invalid(source, f"  {error.error_count()} mistakes") from error
            # Unknown keys first: a misspelt key is also the reason why the right one is missing.
            found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
            problems = "\n".join(f"  {_explain(cls, dict(problem))}" for problem in found[:5])
            raise _invalid(source, problems) from error
        except ValueError as error:
            raise _invalid(source, f"  {error}") from error

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest from a file of its own.

        Raises ManifestError, NotFoundError, or RegistryError if the file cannot be read.
        """
        if path.exists() and not path.is_file():
            raise ManifestError(f"{path}: it is not a file")
        try:
            with open(path, "rb") as file:
                return cls.from_json(file.read(MAX_BYTES + 1), source=path)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such manifest", mend="spmhub list") from error
        except OSError as error:
            raise RegistryError(f"cannot read {path}: {error.strerror}", mend=f"chmod u+r {quoted(path)}") from error

    @classmethod
    def json_schema(cls) -> str:
        """Return the JSON Schema of a manifest, as committed in manifests/schema.json."""
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}
        return json.dumps(schema, indent=2) + "\n"


def _invalid(source: object, problems: str) -> ManifestError:
    return ManifestError(
        f"{source} is not a valid manifest:\n{problems}",
        mend="compare it with manifests/schema.json, or fetch the adapter again",
    )


def slug(text: str) -> str:
    """Make a file name from a concept: "Van Gogh" -> "van-gogh".

    Raises UsageError if `text` is blank.
    """
    if not text.strip():
        raise UsageError("the concept is empty", mend='name what to erase, for instance: spmhub train "van gogh"')
    ascii_text = unicodedata.normalize("NFKD", text.strip()).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9._]+", "-", ascii_text).strip("-._")[:96].rstrip("-._")
    # A name in another script leaves nothing in ASCII: a digest keeps different concepts apart.
    return name or "concept-" + hashlib.sha256(text.strip().encode()).hexdigest()[:8]


def plain_name(text: str) -> str:
    """Return one spelling for all of a name: "Van Gogh", "van_gogh" and "van.gogh" all give "van-gogh"."""
    return re.sub(r"[._-]+", "-", slug(text)).strip("-")


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> str:
    """Return one problem as "key: the mistake".

    An unknown key is followed by the known keys that it resembles.
    """
    location = problem["loc"]
    key = ".".join(str(step)[:80] for step in location) or "(whole file)"
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg']} (got {str(problem['input'])[:80]!r})"
    for step in location[:-1]:
        if isinstance(step, str) and step in model.model_fields:
            annotation = model.model_fields[step].annotation
            parts = [annotation, *getattr(annotation, "__args__", ())]
            model = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), model)
    meant = nearest(str(location[-1])[:80], model.model_fields)
    return f"{key}: unknown key" + (f"; did you mean {' or '.join(meant)}?" if meant else "")
