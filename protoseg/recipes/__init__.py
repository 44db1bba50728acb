"""The papers end to end, as the command ``protoseg`` runs them: from pictures to masks and segmentation networks."""
