"""Choosing from a large corpus the documents that resemble a small one."""
