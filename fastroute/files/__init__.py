"""Files in, files out: pictures, folders, large files, budgets that several images share."""
