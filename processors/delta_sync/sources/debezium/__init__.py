"""Sources that Delta knows by their connector alone: what it can tell of them is what Debezium writes into Kafka."""
