"""Problems of models of other libraries, with their own conventions of batches, labels and losses."""
