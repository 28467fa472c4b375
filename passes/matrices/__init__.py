"""Weight matrices as passes make them: the forms they take, how they are rounded, and how they are fitted."""
