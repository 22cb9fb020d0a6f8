"""The specification: `pipeline.yaml`, reviewed and kept in git, and all that Delta needs to know about a pipeline.

Everything else in the pipeline's folder follows from it (`connector.json`) or is the user's (`processor.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from delta_sync.errors import UsageError
from delta_sync.expressions import parse_expression
from delta_sync.masking import REDACTED, Mask
from delta_sync.secrets import is_reference, is_secret_name, spelt_out
from delta_sync.urls import check_url

SPEC_FILE = "pipeline.yaml"
PROCESSOR_FILE = "processor.py"
CONNECTOR_FILE = "connector.json"

NAME_PATTERN = (
    r"^[a-z][a-z0-9_]{0,39}$"  # 40: a slot's name is 63 bytes at most, and has a prefix and room for a suffix
)
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)$")


def parse_duration_s(value: object) -> float:
    """Return seconds of `10m`, `1.5s`, `7d` or a plain number of seconds. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _DURATION.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a duration; write it like 500ms, 30s, 10m, 12h or 7d")
    return float(match[1]) * _UNITS_S[match[2]]


def format_duration(seconds: float) -> str:
    """Return a duration in its largest whole unit, as `parse_duration_s` reads it."""
    for unit in ("d", "h", "m", "s", "ms"):
        count = seconds / _UNITS_S[unit]
        if count >= 1 and abs(count - round(count)) < 1e-9:
            return f"{round(count)}{unit}"
    return f"{seconds}s"


Duration = Annotated[
    float,
    BeforeValidator(parse_duration_s),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": ["string", "number"], "pattern": _DURATION.pattern, "examples": ["30s", "10m", "7d"]}),
]


_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"^(\d+)\s*([kmg]?)(?:i?b)?$", re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Return bytes of `800MB`, `1GiB` (both in powers of 1,024) or a plain number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a size; write it like 800MiB or 1GiB")
    return int(match[1]) * _SIZE_UNITS[match[2].lower()]


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema({"type": ["string", "integer"], "pattern": _SIZE.pattern, "examples": ["800MiB", "1GiB"]}),
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSpec(_Model):
    """The database that is the source of truth."""

    url: str = Field(
        description="postgresql://user@host:port/database, without the password; or debezium://CLASS of a connector"
        " that Delta does not know itself, whose options are under connector:."
    )
    password: str | None = Field(default=None, description="A reference: ${env:NAME} or ${file:/path}.")
    slot: str | None = Field(
        default=None, pattern=r"^[a-z0-9_]{1,63}$", description="Replication slot; default delta_<name>."
    )
    publication: str | None = Field(
        default=None, min_length=1, max_length=63, description="Publication; default delta_<name>."
    )
    heartbeat: Duration = Field(
        default=1.0,
        gt=0,
        description="How often a heartbeat goes through the log (pg_logical_emit_message: no table is written). "
        "It lets the slot advance while the tables rest, and it measures the lag.",
    )
    on_lost_log: Literal["new_epoch", "stop"] = Field(
        default="new_epoch",
        description="What to do when changes may have been lost (a promoted replica, a restored backup, a slot that is "
        "gone, invalidated or moved): load every table again and remove what the source lacks, or stop until somebody "
        "types --new-slot. A source that may be another database stops the pipeline either way.",
    )

    @field_validator("password")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        return _must_refer(value, "source.password")

    @field_validator("url")
    @classmethod
    def _no_password(cls, value: str) -> str:
        _must_be_readable(value, "source.url")
        found = spelt_out(value)
        if found in ("a password", "password"):
            raise ValueError(
                f"source.url spells out {found}; move it to source.password as ${{env:NAME}} or ${{file:/path}}"
            )
        _must_not_spell_out(value, "source.url")
        return value

    @property
    def kind(self) -> str:
        """`postgresql`, `mysql`, `mariadb` or `debezium`: the URL's scheme, in its canonical form."""
        scheme = self.url.partition("://")[0].lower() if "://" in self.url else ""
        return {"postgres": "postgresql"}.get(scheme, scheme)

    @property
    def connector_class(self) -> str:
        """Of the kind `debezium`: the Java class of its connector."""
        return self.url.partition("://")[2]


class MaskSpec(_Model):
    """What stands in place of a column's values: one of the three. `redact` alone is `redact: '***'`."""

    hash: str | None = Field(
        default=None,
        description="HMAC-SHA256 of the value with this secret, a reference: ${env:NAME} or ${file:/path}.",
    )
    redact: str | None = Field(default=None, description="This text, whatever the value is.")
    truncate: int | None = Field(default=None, ge=0, description="So many characters from the value's beginning.")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: object) -> object:
        return {"redact": REDACTED} if value == "redact" else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"const": "redact"}]}

    @model_validator(mode="after")
    def _one_of_three(self) -> MaskSpec:
        if sum(given is not None for given in (self.hash, self.redact, self.truncate)) != 1:
            raise ValueError("give one of hash, redact and truncate")
        _must_refer(self.hash, "hash")
        return self

    @property
    def mask(self) -> Mask:
        """The mask, for a column."""
        if self.hash is not None:
            return Mask("hash", self.hash)
        return Mask("truncate", self.truncate) if self.truncate is not None else Mask("redact", self.redact or "")


class ShapeSpec(_Model):
    """What becomes of a table's rows before a processor sees them; without a processor, the document."""

    where: str | None = Field(
        default=None, description="An expression over the columns; a row for which it is not true has no document."
    )
    include: list[str] | None = Field(default=None, min_length=1, description="Only these columns, in this order.")
    exclude: list[str] = Field(default_factory=list[str], description="All but these columns.")
    rename: dict[str, str] = Field(default_factory=dict, description="A field's name, by its column.")
    mask: dict[str, MaskSpec] = Field(
        default_factory=dict[str, MaskSpec],
        description="By column: hash: ${env:NAME}, redact, or truncate: 4.",
    )
    constant: dict[str, Any] = Field(default_factory=dict, description="Fields that are the same in every document.")
    computed: dict[str, str] = Field(
        default_factory=dict, description="Fields by an expression over the columns, such as upper(title[:1])."
    )

    @field_validator("where")
    @classmethod
    def _filter(cls, value: str | None) -> str | None:
        if value is not None:
            parse_expression(value)
        return value

    @field_validator("computed")
    @classmethod
    def _expressions(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            parse_expression(text)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ShapeSpec:
        if self.include is not None and self.exclude:
            raise ValueError("give include or exclude, not both")
        left_out = [name for name in self.rename if name in self.exclude or name not in (self.include or self.rename)]
        if left_out:
            raise ValueError(f"rename has {left_out[0]}, which is not among the columns that are left")
        return self


class TableSpec(_Model):
    """One table of the source."""

    shape: ShapeSpec | None = Field(
        default=None,
        description="Shaping without code; {} is the row as it is. A table that has it needs no function in"
        " processor.py.",
    )

    sinks: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Options of this table in a sink, by the sink's name, such as {cache: {key: 'movie:{id}'}}.",
    )


class SinkSpec(BaseModel):
    """One derived store. Beside `url` it may have the options of its kind."""

    model_config = ConfigDict(extra="allow", frozen=True)

    url: str = Field(description="Where the store is; a password in it must be a reference.")

    @model_validator(mode="after")
    def _secrets_are_references(self) -> SinkSpec:
        _must_be_readable(self.url, "the sink's url")
        _must_not_spell_out(self.url, "the sink's url")
        _all_must_refer(self.options)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options beside `url`, not validated yet: the sink's own model does that."""
        return dict(self.model_extra or {})


class ErrorSpec(_Model):
    """When a pipeline stops instead of going on."""

    max_dead_letters_per_minute: int = Field(
        default=100,
        ge=0,
        description="More dead letters than this within a minute stop the pipeline; positions stay where they are.",
    )


class LoadSpec(_Model):
    """How rows that are already in the source are read."""

    chunk_rows: int = Field(default=10_000, ge=1, le=1_000_000, description="Rows read in one snapshot.")
    chunk_bytes: int = Field(
        default=16 << 20, ge=1024, description="A chunk ends early when its rows have this many bytes."
    )
    parallel: int = Field(default=2, ge=1, le=64, description="Chunks that each process reads at once.")


class SecuritySpec(_Model):
    """How clients log in to Kafka. Without it: in the clear, without a name."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(description="As Kafka calls them.")
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        default=None, description="Of SASL; needed with SASL_PLAINTEXT and SASL_SSL."
    )
    username: str | None = Field(default=None, description="Of SASL.")
    password: str | None = Field(default=None, description="A reference: ${env:NAME} or ${file:/path}.")
    ca_file: str | None = Field(
        default=None, description="PEM file with the authorities to trust; default: the system's."
    )
    certificate_file: str | None = Field(default=None, description="PEM file of the client's certificate, for mTLS.")
    key_file: str | None = Field(default=None, description="PEM file of the client's key, for mTLS.")

    @field_validator("password")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        return _must_refer(value, "kafka.security.password")

    @model_validator(mode="after")
    def _complete(self) -> SecuritySpec:
        if self.protocol.startswith("SASL_"):
            if None in (self.mechanism, self.username, self.password):
                raise ValueError(f"protocol {self.protocol} needs mechanism, username and password")
        elif (self.mechanism, self.username, self.password) != (None, None, None):
            raise ValueError(
                f"mechanism, username and password are for SASL_PLAINTEXT and SASL_SSL, not {self.protocol}"
            )
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file belong together")
        if self.protocol.endswith("PLAINTEXT") and (self.ca_file or self.certificate_file):
            raise ValueError(f"ca_file and certificate_file are for SSL and SASL_SSL, not {self.protocol}")
        return self


class RegistrySpec(_Model):
    """The schema registry, by the API that Confluent's and Apicurio's have in common."""

    url: str = Field(description="http://host:8080/apis/ccompat/v7 (Apicurio), http://host:8081 (Confluent).")
    username: str | None = Field(default=None, description="For basic authentication.")
    password: str | None = Field(default=None, description="A reference: ${env:NAME} or ${file:/path}.")
    token: str | None = Field(default=None, description="For bearer authentication, instead; a reference.")
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="For https: authorities to trust, in PEM; default: the well-known ones.",
    )

    @field_validator("password", "token")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        return _must_refer(value, "kafka.registry.password and token")

    @model_validator(mode="after")
    def _consistent(self) -> RegistrySpec:
        if not self.url.lower().startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
        if self.ca_file is not None and self.url.lower().startswith("http://"):
            raise ValueError("ca_file is for a url that begins with https://")
        _must_be_readable(self.url, "url")
        found = spelt_out(self.url)
        if found is not None:
            raise ValueError(f"url spells out {found}; give username, and password as ${{env:NAME}} or ${{file:/path}}")
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password belong together")
        if self.token is not None and self.username is not None:
            raise ValueError("token is for bearer authentication, username and password for basic: give one of them")
        return self


class KafkaSpec(_Model):
    """The Kafka transport: where it is, and how topics are made so that nothing is lost."""

    bootstrap_servers: str = Field(min_length=1, description="host:9092,host:9092")
    registry: RegistrySpec
    security: SecuritySpec | None = None
    client: Literal["auto", "kafka-python", "confluent-kafka"] = Field(
        default="auto", description="auto: confluent-kafka where it is installed (the extra `fast`), else kafka-python."
    )
    partitions: int = Field(
        default=6, ge=1, le=10_000, description="Of each table's topic: at most so many workers help."
    )
    replication_factor: int = Field(default=3, ge=1, le=32_767)
    min_insync_replicas: int = Field(
        default=2, ge=1, description="So many brokers have a record before it counts as written."
    )
    retention: Duration = Field(
        default=5 * 86400.0, ge=3600, description="How long records are kept; must be below tombstone_ttl."
    )
    session_timeout: Duration = Field(
        default=45.0, ge=6, le=1800, description="A worker that says nothing for so long loses its partitions."
    )
    max_message_bytes: int = Field(default=16 << 20, ge=1 << 20, description="Of a record; a change may be that large.")
    allow_unsafe: bool = Field(
        default=False, description="Accept topics that lose records when a broker does; for tests and trials."
    )

    @model_validator(mode="after")
    def _consistent(self) -> KafkaSpec:
        if self.min_insync_replicas > self.replication_factor:
            raise ValueError("min_insync_replicas cannot be above replication_factor")
        return self


class ProcessorSpec(_Model):
    """What processor.py may take, before it is kept from holding up everything."""

    timeout: Duration = Field(
        default=60.0,
        gt=0,
        description="For a row, or a call of a handler. What takes longer is ended, and is a dead letter.",
    )
    memory: Bytes | None = Field(
        default=None,
        ge=256 << 20,
        description="Resident memory of the process, such as 1GiB. One that has more finishes what it has begun, and"
        " starts itself anew.",
    )


class NoticesSpec(_Model):
    """How others say that a look-up's answers have changed. Without it: `deltactl refresh` alone."""

    token: str | None = Field(
        default=None,
        description="POST /notices at --port takes notices with this bearer token, a reference: ${env:NAME} or"
        " ${file:/path}.",
    )
    topic: str | None = Field(
        default=None, min_length=1, max_length=249, description="Kafka's topic with notices, for transport: kafka."
    )

    @field_validator("token")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        return _must_refer(value, "notices.token")


class PipelineSpec(_Model):
    """A pipeline: a source, its tables, a processor, sinks, a transport."""

    name: str = Field(pattern=NAME_PATTERN, description="Lower-case letters, digits and underscores.")
    source: SourceSpec
    tables: dict[str, TableSpec] = Field(min_length=1, description="By schema.table.")
    sinks: dict[str, SinkSpec] = Field(min_length=1, description="By a name of yours: what processors write `to`.")
    transport: Literal["embedded", "kafka"] = "embedded"
    kafka: KafkaSpec | None = Field(default=None, description="For transport: kafka.")
    state: str = Field(
        default="sqlite:///state.db",
        description="The state store, as an SQLAlchemy URL; SQLite paths are relative to this file.",
    )
    tombstone_ttl: Duration = Field(
        default=7 * 86400.0,
        ge=3600,
        description="How long a delete's version is kept; must exceed the longest dump and dead_letter_ttl.",
    )
    dead_letter_ttl: Duration = Field(
        default=3 * 86400.0, gt=0, description="How long dead letters are kept; must be below tombstone_ttl."
    )
    errors: ErrorSpec = ErrorSpec()
    load: LoadSpec = LoadSpec()
    processor: ProcessorSpec = ProcessorSpec()
    notices: NoticesSpec = NoticesSpec()
    connector: dict[str, str | int | bool] = Field(
        default_factory=dict, description="Debezium options to add or change, by Debezium's names."
    )

    @field_validator("tables", mode="before")
    @classmethod
    def _bare_tables(cls, value: object) -> object:
        """`public.movie:` without anything behind it is a table without options."""
        if isinstance(value, dict):
            return {name: {} if table is None else table for name, table in value.items()}  # pyright: ignore[reportUnknownVariableType] -- from YAML
        return value

    @field_validator("state")
    @classmethod
    def _no_secret_in_state(cls, value: str) -> str:
        _must_be_readable(value, "state")
        _must_not_spell_out(value, "state")
        return value

    @field_validator("connector")
    @classmethod
    def _no_secret_in_connector(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, option in value.items():
            if is_secret_name(name):
                _must_refer(option, f"connector.{name}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PipelineSpec:
        for name in self.sinks:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"sink name {name!r} must be lower-case letters, digits and underscores")
        for table_name, table in self.tables.items():
            if "." not in table_name.strip("."):
                raise ValueError(
                    f"table {table_name!r} must be given with its schema, as public.{table_name.strip('.')}"
                )
            for sink in table.sinks:
                if sink not in self.sinks:
                    raise ValueError(
                        f"table {table_name} has options for sink {sink!r}, but the sinks are {', '.join(self.sinks)}"
                    )
        if self.source.kind == "debezium":
            self._check_debezium()
        if (self.transport == "kafka") != (self.kafka is not None):
            raise ValueError("transport: kafka and the section kafka: belong together")
        if self.notices.topic is not None and self.kafka is None:
            raise ValueError("notices.topic needs transport: kafka; over HTTP, notices.token takes notices with any")
        if self.kafka is not None and self.kafka.retention >= self.tombstone_ttl:
            raise ValueError(
                "kafka.retention must be below tombstone_ttl, or an old record could bring a deleted row back"
            )
        if self.dead_letter_ttl >= self.tombstone_ttl:
            raise ValueError("dead_letter_ttl must be below tombstone_ttl, or a replay could bring a deleted row back")
        return self

    def _check_debezium(self) -> None:
        """A change's version is its place in the topic of its table, so all of them are in one partition."""
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", self.source.connector_class, re.ASCII):
            raise ValueError("source.url must name a class, as debezium://io.debezium.connector.sqlserver.Sql…")
        if self.kafka is not None and "partitions" in self.kafka.model_fields_set and self.kafka.partitions != 1:
            raise ValueError(
                "kafka.partitions must be 1 (or left out) with source.url: debezium://…, because a change's version is"
                " its place in the topic of its table"
            )

    @property
    def partitions(self) -> int:
        """Of each table's topic; for transport: kafka."""
        assert self.kafka is not None, "the specification has transport: kafka"
        return 1 if self.source.kind == "debezium" else self.kafka.partitions

    @property
    def shapes(self) -> dict[str, ShapeSpec]:
        """The shapes of the tables that have one."""
        return {name: table.shape for name, table in self.tables.items() if table.shape is not None}

    @property
    def slot(self) -> str:
        """The replication slot's name."""
        return self.source.slot or f"delta_{self.name}"

    @property
    def publication(self) -> str:
        """The publication's name."""
        return self.source.publication or f"delta_{self.name}"

    @property
    def heartbeat_prefix(self) -> str:
        """The prefix of the logical messages that this pipeline's heartbeats are."""
        return f"delta.{self.name}"


def _must_refer(value: object, where: str) -> str | None:
    # References alone: text before or behind one would be a part of the secret, in plain text.
    if value is None or (isinstance(value, str) and is_reference(value)):
        return value
    raise ValueError(
        f"{where} must be a reference, ${{env:NAME}} or ${{file:/path}}, and nothing else: never the secret itself, nor"
        " a part of it"
    )


def _all_must_refer(options: Mapping[str, Any], where: str = "") -> None:
    """See to it that what is a secret by its name is a reference, also within options that have options."""
    for name, value in options.items():
        if is_secret_name(name):
            _must_refer(value, f"{where}{name}")
        elif isinstance(value, Mapping):
            _all_must_refer(cast("Mapping[str, Any]", value), f"{where}{name}.")


def _must_not_spell_out(url: str, what: str) -> None:
    found = spelt_out(url)
    if found is not None:
        raise ValueError(f"{what} spells out {found}; write it as ${{env:NAME}} or ${{file:/path}}")


def _must_be_readable(url: str, what: str) -> None:
    try:
        check_url(url, what)
    except UsageError as error:
        raise ValueError(str(error).rstrip(".")) from None  # what pydantic makes a finding of


def parse_spec(text: str, where: str) -> PipelineSpec:
    """Return the specification that a YAML text holds. Raises UsageError: a sentence per mistake, naming `where`."""
    try:
        tree: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)  # pyright: ignore[reportUnknownMemberType] -- PyYAML has no types of its own
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        # Neither what the parser quotes nor its own text, which has the line itself: that may be one with a password.
        problem = re.sub(r"'.*'|\".*\"", "…", getattr(error, "problem", None) or type(error).__name__)
        raise UsageError(f"{where}{line} is not YAML: {problem}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{where} must hold a mapping with name, source, tables and sinks.")
    _refuse_duplicates(tree, where, set())
    try:
        return PipelineSpec.model_validate(data)
    except ValidationError as error:
        raise UsageError(validation_sentences(error, where, PipelineSpec, tree)) from None  # its own text quotes values


def spec_from(data: Mapping[str, Any], where: str) -> PipelineSpec:
    """Return the specification that a mapping describes. Raises UsageError."""
    try:
        return PipelineSpec.model_validate(data)
    except ValidationError as error:
        raise UsageError(validation_sentences(error, where, PipelineSpec)) from None  # its own text quotes values


def validation_sentences(
    error: ValidationError, where: str, model: type[BaseModel], tree: yaml.Node | None = None
) -> str:
    """Return one sentence for each mistake that pydantic found, without quoting values (one could be a secret).

    `model` is what was validated; `tree` is the YAML that it came from, for the lines.
    """
    sentences: list[str] = []
    for detail in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            options = ", ".join(_options_at(model, detail["loc"][:-1])) or "none"
            message = f"there is no such option here; the options are {options}"
        message = _PLAIN_WORDS.get(detail["type"], message)
        line = _line_of(tree, detail["loc"])
        before = "" if not place or message.startswith(place) else f"{place}: "
        sentences.append(f"{where}{f' line {line}' if line else ''}: {before}{message}.")
    return "\n".join(sentences)


_PLAIN_WORDS = {
    "missing": "it is missing",
    "dict_type": "it must hold options, each as `name: value` in a line of its own",
    "model_type": "it must hold options, each as `name: value` in a line of its own",
}


def _options_at(model: Any, place: Sequence[int | str]) -> list[str]:
    """Return the names of the options that there are at a place."""
    for part in place:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
        else:  # a mapping by names of the user's own
            model = get_args(model)[-1]
        if get_origin(model) in (Union, UnionType):  # with None, or with what else may stand there
            kinds = get_args(model)
            model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), kinds[0])
    return list(model.model_fields)


def _line_of(tree: yaml.Node | None, place: Sequence[int | str]) -> int | None:
    """Return the line of a place, or of what is nearest to it; None when nothing of it is there."""
    node, line = tree, None
    for part in place:
        if not isinstance(node, yaml.MappingNode):
            break
        entries: list[tuple[yaml.Node, yaml.Node]] = node.value
        found = next(((key, value) for key, value in entries if key.value == part), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _refuse_duplicates(node: yaml.Node | None, where: str, seen: set[int]) -> None:
    """Raise UsageError when a mapping has a key twice: YAML says it may not, but its parser takes the last one."""
    if node is None or id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))  # an alias may lead back to what it is in
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, where, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(f"{where} line {line}: {key.value} is there twice, before in line {lines[key.value]}.")
            lines[key.value] = line
        _refuse_duplicates(value, where, seen)


def load_spec(folder: Path) -> PipelineSpec:
    """Read `pipeline.yaml` of a pipeline's folder. Raises UsageError when it is missing or wrong."""
    path = folder / SPEC_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"There is no {path}; `deltactl pipeline create` writes one.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8.") from None
    spec = parse_spec(text, str(path))
    if spec.name != folder.name:
        raise UsageError(f"{path}: name is {spec.name!r}, but the folder is {folder.name!r}; they must be the same.")
    return spec


def dump_spec(spec: PipelineSpec) -> str:
    """Return the YAML of a specification, without what has its default. Same specification, same text."""
    data = spec.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
