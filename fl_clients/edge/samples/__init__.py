"""The device's own data, one sample at a time: index, content files, labels that come later, quarantine, snapshots."""
