"""Photos and masks as people keep them, imported into the layout of `FolderSource`."""
