"""The machine underneath: files, processes, memory, patches of dependencies."""
