"""How results are shown: tables, JSON, pictures, and the comparison of two runs."""
