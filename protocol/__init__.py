"""Bytes ⇄ events: wire and disk formats, declared once with construct. No socket, clock, disk or asyncio."""
