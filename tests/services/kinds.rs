//! The four services: how each is asked, loaded, and says farewell.

use std::time::{Duration, Instant};

use super::client::{get, page, redis};
use crate::container::home::Home;
use crate::support::{LINUX_PATIENCE, tool};

/// How much load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// For what is emulated.
    Small,
    Full,
}

/// One service.
pub struct Service {
    /// Of its image.
    pub name: &'static str,
    pub port: u16,
    pub host_port: u16,
    /// Where its data lies.
    pub data: &'static str,
    /// In the place of the image's own.
    pub command: &'static [&'static str],
    /// What it prints when it ends in good order, in this order.
    pub farewell: &'static [&'static str],
    /// Programs of this host that ask it.
    pub tools: &'static [&'static str],
    answers: fn(&Home, &str, u16) -> bool,
    /// Has it keep something, and finds that again.
    pub write: fn(&Home, &str, u16),
    pub read: fn(&Home, &str, u16),
    /// Returns a figure.
    pub load: fn(&Home, &str, u16, Size) -> String,
}

impl Service {
    /// Waits until it answers. One that ends before that has failed.
    pub fn await_answer(&self, home: &Home, container: &str) {
        let deadline = Instant::now() + 3 * LINUX_PATIENCE;
        while !(self.answers)(home, container, self.host_port) {
            let running = home.inspect(container)["State"]["Running"] == true;
            assert!(
                running && Instant::now() < deadline,
                "{container} does not answer: {:?}",
                home.run(&["logs", container])
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

pub const NGINX: Service = Service {
    name: "nginx",
    port: 80,
    host_port: 18080,
    data: "/var/www/html",
    // Its own messages, of which the image's configuration prints errors only.
    command: &["nginx", "-g", "daemon off; error_log /dev/stderr notice;"],
    farewell: &["(SIGQUIT) received", "gracefully shutting down", "exited with code 0", "exit"],
    tools: &["wrk"],
    answers: |_, _, port| get(port, "/").is_ok_and(|(status, _)| status.contains("200")),
    write: |home, container, port| {
        assert!(page(port, "/").contains("Welcome to nginx"));
        let write = "echo kept data >/var/www/html/kept.txt; sync";
        home.run(&["exec", container, "sh", "-c", write]).ok();
        assert_eq!(page(port, "/kept.txt"), "kept data\n");
    },
    read: |_, _, port| assert_eq!(page(port, "/kept.txt"), "kept data\n"),
    load: |_, _, port, size| wrk(port, size),
};

pub const FASTAPI: Service = Service {
    name: "fastapi",
    port: 8000,
    host_port: 18000,
    data: "/data",
    command: &[],
    farewell: &["Shutting down", "Application shutdown complete", "Finished server process"],
    tools: &["wrk"],
    answers: |_, _, port| get(port, "/health").is_ok_and(|(status, _)| status.contains("200")),
    write: |_, _, port| {
        for number in 1..=3 {
            assert_eq!(page(port, "/count"), format!("{{\"count\":{number}}}"));
        }
    },
    read: |_, _, port| assert_eq!(page(port, "/count"), "{\"count\":4}"),
    load: |_, _, port, size| wrk(port, size),
};

pub const REDIS: Service = Service {
    name: "redis",
    port: 6379,
    host_port: 16379,
    data: "/data",
    command: &[],
    farewell: &["Received SIGTERM", "DB saved on disk", "bye bye"],
    tools: &["redis-benchmark"],
    answers: |_, _, port| redis(port, &["PING"]).is_ok_and(|answer| answer == "+PONG"),
    write: |_, _, port| {
        assert_eq!(redis(port, &["SET", "kept", "data\r\n\0"]).expect("an answer"), "+OK");
        assert_eq!(redis(port, &["RPUSH", "list", "a", "b"]).expect("an answer"), ":2");
    },
    read: |_, _, port| {
        assert_eq!(redis(port, &["GET", "kept"]).expect("an answer"), "data\r\n\0");
        assert_eq!(redis(port, &["LLEN", "list"]).expect("an answer"), ":2");
    },
    load: |_, _, port, size| {
        let (requests, clients) = if size == Size::Small { ("1000", "4") } else { ("40000", "32") };
        let port = port.to_string();
        let arguments = ["-p", &port, "-n", requests, "-c", clients, "-t", "set,get", "--csv"];
        let printed = tool("redis-benchmark", &arguments);
        // "SET","123.45",…
        let rates: Vec<&str> = printed.lines().filter(|line| line.contains("ET\"")).collect();
        assert_eq!(rates.len(), 2, "{printed}");
        let rate = |line: &str| {
            line.replace('"', "").split(',').take(2).collect::<Vec<_>>().join(" ") + " requests/s"
        };
        format!(
            "redis-benchmark, {requests} requests by {clients} clients: {}, {}",
            rate(rates[0]),
            rate(rates[1])
        )
    },
};

pub const POSTGRES: Service = Service {
    name: "postgres",
    port: 5432,
    host_port: 15432,
    data: "/var/lib/postgresql/data",
    command: &[],
    farewell: &["received fast shutdown request", "shutting down", "database system is shut down"],
    tools: &[],
    // One that is just made starts twice, the first time without a network.
    answers: |home, container, _| {
        home.run(&["logs", container]).stderr.contains("ready to accept connections")
    },
    write: |home, container, port| {
        query(home, container, port, "CREATE TABLE kept (n integer PRIMARY KEY, words text)");
        query(
            home,
            container,
            port,
            "INSERT INTO kept SELECT n, repeat('x', n) FROM generate_series(1, 1000) AS n",
        );
    },
    read: |home, container, port| {
        assert_eq!(
            query(home, container, port, "SELECT count(*), sum(length(words)) FROM kept"),
            "1000|500500\n"
        );
    },
    load: |home, image, port, size| {
        let (clients, transactions) = if size == Size::Small { ("2", "10") } else { ("4", "250") };
        client(home, image, port, "pgbench", &["-i", "-q", "-s", "1"]);
        let printed = client(home, image, port, "pgbench", &["-n", "-c", clients, "-t", transactions]);
        let total =
            clients.parse::<u32>().expect("a number") * transactions.parse::<u32>().expect("a number");
        assert!(printed.contains(&format!("actually processed: {total}/{total}")), "{printed}");
        assert!(printed.contains("failed transactions: 0 (0.000%)"), "{printed}");
        let rate = printed.lines().find_map(|line| line.strip_prefix("tps = ")).unwrap_or_default();
        format!("pgbench, {total} transactions by {clients} clients: {rate} transactions/s")
    },
};

/// A client of PostgreSQL's in a native container, which comes by the published port as any other does.
fn client(home: &Home, image: &str, port: u16, program: &str, arguments: &[&str]) -> String {
    let entrypoint = format!("/usr/lib/postgresql/15/bin/{program}");
    let port = port.to_string();
    let mut all =
        vec!["run", "--rm", "--network=host", "--no-healthcheck", "--entrypoint", &entrypoint, image];
    all.extend(["-h", "127.0.0.1", "-p", &port, "-U", "postgres"]);
    all.extend(arguments);
    home.run(&all).ok()
}

fn query(home: &Home, container: &str, port: u16, words: &str) -> String {
    let image = home.inspect(container)["Config"]["Image"].as_str().expect("a name").to_owned();
    client(home, &image, port, "psql", &["-qAt", "-v", "ON_ERROR_STOP=1", "-c", words])
}

/// Requests of a page for some seconds. Not one may fail.
fn wrk(port: u16, size: Size) -> String {
    let (threads, connections) = if size == Size::Small { ("1", "4") } else { ("2", "32") };
    let url = format!("http://127.0.0.1:{port}/");
    let printed = tool("wrk", &["-t", threads, "-c", connections, "-d", "4s", "--timeout", "100s", &url]);
    assert!(!printed.contains("Socket errors") && !printed.contains("Non-2xx"), "{printed}");
    let requests =
        printed.lines().find_map(|line| line.trim().split_once(" requests in ")).map(|(count, _)| count);
    assert!(requests.is_some_and(|count| count.parse::<u64>().is_ok_and(|count| count > 0)), "{printed}");
    let rate = printed.lines().find_map(|line| line.strip_prefix("Requests/sec:")).unwrap_or_default().trim();
    format!("wrk, {connections} connections: {rate} requests/s")
}
