"""Other libraries' files, against the libraries that write them."""
