"""Where the library of the compiled core comes from: a wheel brings it, or it is compiled here."""
