"""The Kafka transport: topics, the consumer group, Avro (docs/design/kafka.md)."""
