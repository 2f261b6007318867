"""Pages for a browser: tables and patterns in one file, which needs no network."""

from .page import Page, Table, write_page

__all__ = ["Page", "Table", "write_page"]
