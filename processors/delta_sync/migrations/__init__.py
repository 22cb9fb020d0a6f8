"""Migrations of the state store, forward only: `delta_sync.state` runs them when it opens a store."""
