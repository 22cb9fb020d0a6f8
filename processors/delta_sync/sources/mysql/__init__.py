"""MariaDB and MySQL as sources: what they must be like, what they hold, and reading them beside their log."""
