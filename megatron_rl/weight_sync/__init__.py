"""Transports of new weights from the actor to the engines, one file per transport, and their checksums."""
