"""What the operator and the other agent call: gRPC, TLS, enrolment."""
