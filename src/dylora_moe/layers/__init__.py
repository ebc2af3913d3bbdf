"""Applying: stock PEFT layers that mix their experts by what is in force. Knows no router."""
