"""What is measured: the rows of the tables, the shapes they run on, and the definition that each of them must agree with."""
