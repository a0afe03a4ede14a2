"""The front door: gRPC services, their two hosts (own server, Serve's ingress), and a client."""
