"""How results are shown: tables, JSON, HTML, and what is drawn."""
