"""Merge: several experts become one."""
