"""What the demo's alerts can say: three systems, six causes each, fourteen wordings a cause.

`{n}` stands for a count, `{p}` for a percentage, `{s}` for seconds, `{m}` for minutes and `{app}` for an application.
A wording that is held out for scoring is never seen in training; which ones are held out is drawn from the seed.
"""

from __future__ import annotations

import msgspec


class Cause(msgspec.Struct, frozen=True):
    """One thing that can be wrong."""

    name: str
    """Value of the field `cause`."""
    step: str
    """Value of the field `runbook_step`."""
    wordings: tuple[str, ...]
    """Symptoms, each as monitoring would say it."""


class System(msgspec.Struct, frozen=True):
    """One kind of system that raises alerts."""

    name: str
    """File name of its data set."""
    title: str
    """As people call it."""
    components: tuple[str, ...]
    """First halves of component names; a number follows."""
    causes: tuple[Cause, ...]


DATABASE = System(
    name="database",
    title="database",
    components=(
        "orders-db",
        "billing-db",
        "users-db",
        "stock-db",
        "events-db",
        "search-db",
        "ledger-db",
        "media-db",
    ),
    causes=(
        Cause(
            name="connection_exhaustion",
            step="recycle idle sessions",
            wordings=(
                "remaining connection slots are reserved, {n} clients were refused",
                "too many connections, the limit of {n} is reached",
                "connection pool exhausted after {n} open sessions",
                "no free connection for {app}, {n} sessions are idle in transaction",
                "new logins are rejected because all {n} connections are taken",
                "sessions at {p} percent of max_connections and still rising",
                "{app} waits {s} s for a connection from the pool",
                "could not open a connection: the server already has {n} clients",
                "pool timeout, {n} requests from {app} queue for a connection",
                "the session count hit its ceiling of {n}",
                "clients of {app} get 'sorry, too many clients already'",
                "connection usage {p} percent, most sessions are idle",
                "{n} idle sessions hold every connection slot",
                "the listener refuses connections, maximum number of sessions exceeded",
            ),
        ),
        Cause(
            name="replication_lag",
            step="restart the replica apply worker",
            wordings=(
                "the replica is {m} minutes behind the primary",
                "replication lag of {s} seconds and growing",
                "the standby has not applied changes for {m} minutes",
                "replay delay on the replica reached {s} s",
                "the follower trails its leader by {n} transactions",
                "stale reads from the replica, lag is {s} seconds",
                "WAL replay stands still on the standby, {n} segments wait",
                "the secondary is out of date by {m} minutes",
                "binlog position of the replica falls behind by {n} events",
                "the apply worker of the standby cannot keep up, delay {s} s",
                "read replica shows data from {m} minutes ago",
                "replication delay alarm: {s} seconds between primary and standby",
                "{n} changes are queued for the replica and not applied",
                "the replication slot keeps {n} MB because the follower lags",
            ),
        ),
        Cause(
            name="lock_contention",
            step="end the blocking transaction",
            wordings=(
                "{n} transactions wait for a row lock held by {app}",
                "deadlock detected between two updates of {app}",
                "lock wait timeout exceeded after {s} s",
                "an ALTER TABLE holds an exclusive lock for {m} minutes",
                "{n} sessions are blocked by one open transaction",
                "updates hang behind a table lock that {app} took",
                "the blocking chain is {n} sessions long",
                "a long transaction of {app} blocks {n} writers",
                "lock queue of {n} entries on the accounts table",
                "deadlocks per minute rose to {n}",
                "writers are stuck, an uncommitted transaction keeps its locks for {m} minutes",
                "average lock wait is {s} seconds",
                "{app} was chosen as deadlock victim {n} times",
                "row locks are held for {m} minutes and block other updates",
            ),
        ),
        Cause(
            name="disk_full",
            step="purge old logs and extend the volume",
            wordings=(
                "data volume is {p} percent full",
                "could not extend file: no space left on device",
                "only {n} MB of disk space left for the tablespace",
                "the log partition filled up in {m} minutes",
                "free disk space fell below {n} MB",
                "writes fail, the file system is full",
                "disk usage of the data directory at {p} percent",
                "no room for new WAL files, the disk is full",
                "tablespace is out of space, {n} MB remain",
                "the storage volume runs out of space in {m} minutes",
                "archive logs fill the disk, {p} percent used",
                "the server stopped writing because its volume has no space left",
                "temporary files took the last {n} MB of disk",
                "volume capacity alarm, {p} percent of the disk in use",
            ),
        ),
        Cause(
            name="slow_query",
            step="analyze the plan and add an index",
            wordings=(
                "a query of {app} runs for {s} seconds",
                "sequential scan over {n} million rows in a report of {app}",
                "query time at the 95th percentile is {s} s",
                "{n} queries took longer than {s} seconds",
                "the slow query log grew by {n} entries",
                "a join without an index scans the whole table",
                "a full table scan of {app} burns {p} percent of the CPU",
                "the planner picks a bad plan, the query takes {s} s",
                "a SELECT of {app} reads {n} million rows to return ten",
                "statement runtime rose from milliseconds to {s} seconds",
                "missing index suspected, query cost is {n} times higher",
                "the report query of {app} has not returned for {m} minutes",
                "slow statements: {n} above the threshold of {s} s",
                "execution plan changed, the same query is {n} times slower",
            ),
        ),
        Cause(
            name="backup_failed",
            step="rerun the backup job",
            wordings=(
                "the nightly backup did not finish",
                "backup job ended with exit code {n}",
                "last good backup is {n} hours old",
                "the dump was aborted after {m} minutes",
                "no valid backup since {n} hours",
                "backup verification failed, checksum of the archive is wrong",
                "the base backup stopped at {p} percent",
                "snapshot for the backup could not be taken",
                "scheduled dump of {app} is missing",
                "the backup agent lost its target after {m} minutes",
                "upload of the backup archive failed {n} times",
                "restore test of last night's backup failed",
                "point in time recovery is not possible, the backup chain is broken",
                "the backup window passed without a finished backup",
            ),
        ),
    ),
)

DIRECTORY = System(
    name="directory",
    title="directory service",
    components=(
        "dc-berlin",
        "dc-oslo",
        "dc-paris",
        "ldap-core",
        "ldap-edge",
        "idm-main",
        "dc-milan",
        "ldap-hr",
    ),
    causes=(
        Cause(
            name="account_lockout",
            step="find the device with the old password",
            wordings=(
                "account svc-{app} locked after {n} bad passwords",
                "{n} users are locked out",
                "lockout threshold reached for the account of {app}",
                "repeated wrong passwords locked {n} accounts",
                "the account of {app} locks again every {m} minutes",
                "user cannot sign in, the account is locked",
                "{n} lockout events within {m} minutes",
                "the help desk unlocked the same account {n} times today",
                "an old password on some device keeps locking svc-{app}",
                "bad password count is {n}, account disabled by lockout policy",
                "lockouts of staff accounts rose to {n}",
                "account locked out, {n} failed logons from one workstation",
                "svc-{app} is locked again after a password change",
                "failed logons lock the account within {m} minutes",
            ),
        ),
        Cause(
            name="certificate_expired",
            step="renew the server certificate",
            wordings=(
                "the LDAPS certificate expired {n} hours ago",
                "TLS handshake fails, the certificate is no longer valid",
                "server certificate has expired, clients of {app} refuse it",
                "certificate validity ended {m} minutes ago",
                "{app} rejects the certificate as out of date",
                "secure LDAP is down because its certificate ran out",
                "the certificate chain contains an expired issuer",
                "not-after date of the certificate has passed",
                "{n} clients report an expired certificate",
                "StartTLS is refused, certificate expired",
                "the domain controller certificate was not renewed in time",
                "certificate renewal failed and the old one is expired",
                "TLS error for {app}: certificate expired",
                "port 636 answers with an invalid, expired certificate",
            ),
        ),
        Cause(
            name="replication_failure",
            step="force a sync with the partner",
            wordings=(
                "replication with the partner failed {n} times",
                "changes have not replicated for {m} minutes",
                "inbound replication is disabled after an error",
                "the partner controller has not synced for {n} hours",
                "replication error 8453, access was denied",
                "{n} directory objects differ between the two controllers",
                "the naming context is not in sync with its partner",
                "a new group is missing on the partner after {m} minutes",
                "replication queue holds {n} pending operations",
                "sync between sites stopped {m} minutes ago",
                "lingering objects block replication from the partner",
                "the last successful sync was {n} hours ago",
                "replicas diverge, {n} entries do not match",
                "replication link to the partner site reports failures",
            ),
        ),
        Cause(
            name="time_skew",
            step="resync the clock with the time source",
            wordings=(
                "the clock is {s} seconds ahead of the domain",
                "Kerberos refuses tickets, clock skew too great",
                "time difference to the time source is {s} s",
                "the system time drifted by {m} minutes",
                "NTP is unreachable and the clock runs away",
                "tickets of {app} are not yet valid, the time is wrong",
                "time service stopped, offset {s} seconds",
                "clock offset exceeds the limit of five minutes",
                "the host lost its time source {m} minutes ago",
                "authentication fails because the clocks differ by {s} s",
                "the local clock lags {m} minutes behind NTP",
                "skew of {s} seconds between client and server time",
                "time synchronisation failed, drift is {s} s",
                "wrong system time after the virtual machine was resumed",
            ),
        ),
        Cause(
            name="dns_record_missing",
            step="re-register the service records",
            wordings=(
                "the SRV record of the controller is missing in DNS",
                "clients cannot find a controller, DNS gives no answer",
                "name lookup for the directory returns NXDOMAIN",
                "DNS registration of the LDAP service failed",
                "{n} service records disappeared from the zone",
                "the host record was scavenged from DNS",
                "_ldap._tcp resolves to nothing",
                "{app} cannot resolve the directory name",
                "DNS has no entry for this controller since {m} minutes",
                "dynamic DNS update was refused {n} times",
                "the zone lacks the records of the Kerberos service",
                "lookups of the domain name fail for {n} clients",
                "a DNS query for the controller ends without records",
                "locator records are not in the DNS zone",
            ),
        ),
        Cause(
            name="bind_failure",
            step="reset the service account password",
            wordings=(
                "LDAP bind of {app} fails with invalid credentials",
                "error 49 for the bind account of {app}",
                "{app} cannot bind, its service password was changed",
                "{n} bind requests were refused",
                "simple bind rejected for svc-{app}",
                "invalid credentials in {n} binds of the connector",
                "the connector of {app} cannot authenticate to LDAP",
                "bind DN of {app} is refused by the server",
                "the service password of {app} has expired, binds fail",
                "LDAP result code 49 for {n} requests",
                "authenticated bind impossible for {app}",
                "{app} sends a wrong service password in its bind",
                "binds of {app} fail {n} times per minute",
                "the service account of {app} gets invalidCredentials",
            ),
        ),
    ),
)

NETWORK = System(
    name="network",
    title="network",
    components=("core-sw", "edge-rt", "access-sw", "wan-rt", "fw-north", "fw-south", "spine-sw", "branch-rt"),
    causes=(
        Cause(
            name="link_down",
            step="check the cable and the transceiver",
            wordings=(
                "interface eth{n} went down",
                "link state of port {n} changed to down",
                "no carrier on uplink {n}",
                "loss of signal on the fibre of port {n}",
                "port {n} flaps between up and down",
                "the uplink lost its carrier {m} minutes ago",
                "line protocol on interface {n} is down",
                "optical power on port {n} is below the limit",
                "the transceiver in port {n} gives no signal",
                "port channel lost member link {n}",
                "the cable of port {n} seems unplugged",
                "interface {n} is not connected any more",
                "physical link {n} failed",
                "link failure on port {n}, no light received",
            ),
        ),
        Cause(
            name="packet_loss",
            step="replace the faulty port or cable",
            wordings=(
                "{p} percent of the packets are lost",
                "packet loss towards {app} reached {p} percent",
                "{n} CRC errors on port eth2",
                "ping to {app} loses every fifth packet",
                "input errors rose by {n} per second",
                "retransmissions of {app} doubled, packets get lost",
                "{n} frames were dropped with checksum errors",
                "loss of {p} percent measured over {m} minutes",
                "packets vanish on the way to {app}",
                "discarded frames: {n} in {m} minutes",
                "the probe lost {n} packets",
                "voice calls break up, packet loss {p} percent",
                "error counter shows {n} corrupted packets",
                "frames with bad checksum, {p} percent packet loss",
            ),
        ),
        Cause(
            name="bgp_session_down",
            step="verify the peer and reset the session",
            wordings=(
                "BGP session with the provider is down",
                "BGP neighbour left the established state",
                "hold timer expired for the BGP peer",
                "{n} routes were withdrawn by the peer",
                "the peer closed the BGP session {m} minutes ago",
                "BGP peering flapped {n} times",
                "no BGP updates from the neighbour since {m} minutes",
                "the BGP neighbour is idle and sends no routes",
                "lost {n} prefixes from the upstream peer",
                "the routing session to the provider was reset",
                "BGP notification received, session closed",
                "peer AS {n} is unreachable by BGP",
                "route count dropped by {n} after the peering broke",
                "BGP state changed from established to active",
            ),
        ),
        Cause(
            name="dhcp_exhausted",
            step="extend the address pool",
            wordings=(
                "the DHCP pool has no free addresses",
                "{n} clients got no IP address",
                "DHCP scope is {p} percent used",
                "no leases left in the address range",
                "address pool exhausted, {n} requests unanswered",
                "new devices receive no lease",
                "only {n} free addresses remain in the scope",
                "DHCP server answers NAK, the range is empty",
                "all {n} addresses of the pool are leased",
                "clients fall back to 169.254 addresses, no lease offered",
                "the lease table is full",
                "DHCP discover from {n} clients stays unanswered, the pool is empty",
                "the address range of the guest network is used up",
                "scope utilisation {p} percent, leases run out",
            ),
        ),
        Cause(
            name="bandwidth_saturated",
            step="limit the top talker",
            wordings=(
                "uplink utilisation at {p} percent",
                "the WAN line is saturated by {app}",
                "traffic of {app} fills the whole bandwidth",
                "output queue drops, the link is at capacity",
                "bandwidth use has been above {p} percent for {m} minutes",
                "{app} sends {n} Mbit/s and congests the line",
                "throughput hit the limit of the circuit",
                "the link runs at {p} percent of its capacity",
                "congestion on the uplink, top talker is {app}",
                "backup traffic of {app} saturates the link",
                "interface load is {p} percent in both directions",
                "the provider line is full, {n} Mbit/s in use",
                "heavy download by {app} uses up the bandwidth",
                "traffic peak of {n} Mbit/s, the circuit is full",
            ),
        ),
        Cause(
            name="firewall_blocked",
            step="review the last rule change",
            wordings=(
                "the firewall denies traffic of {app}",
                "{n} connections of {app} were blocked by policy",
                "a new rule drops packets to port 443",
                "deny counter for {app} rose by {n}",
                "access of {app} is blocked since the rule change",
                "policy update {m} minutes ago, {app} gets denied",
                "the access list rejects {app}",
                "{n} hits on the default deny rule",
                "traffic from {app} is dropped by the security policy",
                "rule {n} blocks the port of {app}",
                "the ACL denies {n} requests per minute",
                "{app} was cut off by a firewall rule",
                "blocked by access policy: {app}",
                "since the last change the firewall rejects {app}",
            ),
        ),
    ),
)

SYSTEMS = (DATABASE, DIRECTORY, NETWORK)

APPLICATIONS = (
    "checkout",
    "payroll",
    "intranet",
    "webshop",
    "crm",
    "wiki",
    "reporting",
    "mailer",
    "mobile",
    "portal",
)

FRAMES = (
    "{component}: {symptom}. {impact}",
    "[{component}] {symptom}. {impact}",
    "{symptom} on {component}. {impact}",
    "Alert from {component}: {symptom}. {impact}",
    "{impact} {component} reports: {symptom}.",
    "{component} at {time}: {symptom}. {impact}",
)
"""How component, symptom and impact are put together; shared by training and held-out alerts."""
