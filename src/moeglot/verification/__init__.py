"""Proofs: structure, values, forward, fingerprints, and the certificate of an output."""
