/** Hashes for the page, beside it. */
