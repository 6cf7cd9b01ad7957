"""Measurements of this library on real hardware, and the tables made from them."""
