"""What two scripts must agree on: conventions, data, model, metrics, file formats."""
