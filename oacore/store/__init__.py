"""Files: artefacts with checksums, the HDF5 store, atomic writes, locks, paths and code hashes."""
