"""Compression of a model block by block: what one decoder layer computes, and works on."""
