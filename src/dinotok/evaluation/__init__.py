"""`dinotok evaluate`: how good reconstructions and samples are, with everything recorded that moves a number."""
