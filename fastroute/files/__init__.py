"""From files to files: pictures, folders, large files, and budgets that several images share."""
