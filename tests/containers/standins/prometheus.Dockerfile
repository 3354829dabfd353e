# prom/prometheus from Debian's package, for machines that cannot pull it: the same command, paths and account.
FROM fleetfed-test/base
RUN apt-get update && apt-get download prometheus && dpkg --unpack --force-depends prometheus_*.deb \
 && rm -rf prometheus_*.deb /var/lib/apt/lists/*
RUN install -d -o nobody -g nogroup /prometheus /etc/prometheus
USER 65534:65534
VOLUME ["/prometheus"]
ENTRYPOINT ["prometheus"]
