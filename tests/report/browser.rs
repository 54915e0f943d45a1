//! Chromium, spoken to by its DevTools protocol over a pipe: JSON, ended by zero bytes.
//!
//! A pipe needs neither a driver beside the browser, nor a port, nor a crate for web sockets. The shell puts the pipe on the
//! descriptors that Chromium expects it on, 3 and 4.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::support::{self, PATIENCE};

/// A browser with one page. It ends with the value.
pub struct Browser {
    child: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    calls: u64,
    /// What the page and the browser have said since the last navigation.
    events: Vec<Value>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// `None`, with a line that says so, where there is no Chromium.
    pub fn start() -> Option<Browser> {
        if !support::has_tool("chromium") {
            return None;
        }
        let profile = support::directory();
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh", "chromium"])
            .args([
                "--headless=new",
                "--remote-debugging-pipe",
                "--no-first-run",
                "--disable-gpu",
                "--disable-dev-shm-usage",
            ])
            // The pages are the test's own, and root has no sandbox in Chromium.
            .args([
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-component-update",
                "--hide-scrollbars",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("chromium");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let (send, messages) = channel();
        thread::spawn(move || {
            for message in output.split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else { break };
                if send.send(message).is_err() {
                    break;
                }
            }
        });
        let mut browser =
            Browser { child, input, messages, session: None, calls: 0, events: vec![], _profile: profile };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let session = browser.call("Target.attachToTarget", json!({"targetId": target, "flatten": true}));
        browser.session = session["sessionId"].as_str().map(String::from);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    /// Calls a method of the protocol and waits for what it returns.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.calls += 1;
        let mut message = json!({"id": self.calls, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.input.write_all(format!("{message}\0").as_bytes()).expect("chromium listens");
        let answer = self.wait(|message, calls| message["id"] == json!(calls));
        assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
        answer["result"].clone()
    }

    fn wait(&mut self, wanted: impl Fn(&Value, u64) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let message = self.messages.recv_timeout(left).expect("an answer from chromium");
            if wanted(&message, self.calls) {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Loads a file.
    pub fn open(&mut self, path: &Path) {
        self.events.clear();
        let answer = self.call("Page.navigate", json!({"url": format!("file://{}", path.display())}));
        assert!(answer["errorText"].is_null(), "{answer}");
        let loaded = |message: &Value| message["method"] == json!("Page.loadEventFired");
        if !self.events.iter().any(loaded) {
            let event = self.wait(|message, _| loaded(message));
            self.events.push(event);
        }
    }

    /// The size of the window, and the colours that its user prefers.
    pub fn window(&mut self, width: u32, height: u32, scheme: &str) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", size);
        let feature = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", feature);
    }

    /// What an expression is worth in the page.
    pub fn eval(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", parameters);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {}", answer["exceptionDetails"]);
        answer["result"]["value"].clone()
    }

    /// Presses and releases a key.
    pub fn key(&mut self, key: &str, code: u32, text: &str) {
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let event =
                json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text});
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// Clicks at the middle of the first element that a selector finds, having scrolled there.
    pub fn click(&mut self, selector: &str) {
        let find = format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{block: 'center', behavior: 'instant'}}); \
             const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
        );
        let at = self.eval(&find);
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event);
        }
    }

    /// A picture of the whole page.
    pub fn screenshot(&mut self, path: &Path) {
        let size = self.call("Page.getLayoutMetrics", json!({}))["cssContentSize"].clone();
        let clip = json!({"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1});
        let answer =
            self.call("Page.captureScreenshot", json!({"captureBeyondViewport": true, "clip": clip}));
        let picture = BASE64_STANDARD.decode(answer["data"].as_str().expect("a picture")).expect("base64");
        std::fs::write(path, picture).expect("a screenshot");
    }

    /// What the page has complained about since it was opened.
    pub fn complaints(&mut self) -> Vec<String> {
        // What was sent before the answer to this has come by then.
        self.eval("1");
        let complaint = |event: &&Value| {
            let method = event["method"].as_str();
            matches!(method, Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded"))
        };
        self.events.iter().filter(complaint).map(|event| event["params"].to_string()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The shell has become the browser, which ends its helpers.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
