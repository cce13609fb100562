"""MQTT between the server and the devices: topics, envelope, session, disk outbox, job store (paho-mqtt and stdlib only)."""
